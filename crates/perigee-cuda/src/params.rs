//! Arguments of the kernels, field for field as in the `params.h` of each kernel folder, where shapes and meanings stand.
//! Device addresses are plain 64-bit numbers; `Pod` keeps hidden padding out, and the loader compares sizes.

use bytemuck::{Pod, Zeroable};

use crate::tensor_map::TensorMap;

/// `load/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct LoadParams {
    pub(crate) source: u64,
    pub(crate) destination: u64,
    pub(crate) rows: u64,
    pub(crate) columns: u64,
    pub(crate) pitch: u64,
    pub(crate) row_offset: u64,
    pub(crate) group: u64,
    pub(crate) group_pitch: u64,
    pub(crate) key: u64,
    pub(crate) first: u64,
    pub(crate) row_stride: u64,
    pub(crate) a: f32,
    pub(crate) b: f32,
    pub(crate) kind: u32,
    pub(crate) stored_bf16: u32,
}

/// `norm/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct NormParams {
    pub(crate) residual: u64,
    pub(crate) delta: u64,
    pub(crate) weight: u64,
    pub(crate) out: u64,
    pub(crate) sum: u64,
    pub(crate) width: u32,
    pub(crate) residual_pitch: u32,
    pub(crate) out_pitch: u32,
    pub(crate) eps: f32,
}

/// `embed/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct GatherParams {
    pub(crate) table: u64,
    pub(crate) indices: u64,
    pub(crate) out: u64,
    pub(crate) first: u32,
    pub(crate) rows: u32,
    pub(crate) width: u32,
    pub(crate) reserved: u32,
}

/// `gemm/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct ElementParams {
    pub(crate) input: u64,
    pub(crate) out: u64,
    pub(crate) count: u64,
    pub(crate) width: u32,
    pub(crate) block: u32,
}

/// `state/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct StateSumParams {
    pub(crate) state: u64,
    pub(crate) tails: u64,
    pub(crate) sums: u64,
    pub(crate) heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) tail: u32,
    pub(crate) first_head: u32,
}

/// `gemm/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct SkinnyParams {
    pub(crate) input: u64,
    pub(crate) weight: u64,
    pub(crate) out: u64,
    pub(crate) tokens: u32,
    pub(crate) rows: u32,
    pub(crate) depth: u32,
    pub(crate) in_pitch: u32,
    pub(crate) out_pitch: u32,
    pub(crate) stages: u32,
}

/// `gemm/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct NormedProductParams {
    pub(crate) product: SkinnyParams,
    pub(crate) norm: NormParams,
}

/// `kda/params.h`: a row of the step.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct KdaRow {
    pub(crate) first_token: u32,
    pub(crate) tokens: u32,
    pub(crate) read_slot: u32,
    pub(crate) write_slot: u32,
}

/// `kda/params.h`: up to 64 tokens of a row.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct KdaChunk {
    pub(crate) row: u32,
    pub(crate) first: u32,
    pub(crate) tokens: u32,
}

/// `kda/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct KdaParams {
    pub(crate) projected: u64,
    pub(crate) gates: u64,
    pub(crate) conv: u64,
    pub(crate) dt_bias: u64,
    pub(crate) a_log: u64,
    pub(crate) o_norm: u64,
    pub(crate) state: u64,
    pub(crate) tails: u64,
    pub(crate) mixed: u64,
    pub(crate) gate_weights: u64,
    pub(crate) rows: u64,
    pub(crate) chunks: u64,
    pub(crate) convolved: u64,
    pub(crate) query: u64,
    pub(crate) key: u64,
    pub(crate) erase: u64,
    pub(crate) update: u64,
    pub(crate) attention: u64,
    pub(crate) decay: u64,
    pub(crate) row_chunks: u64,
    pub(crate) projected_pitch: u32,
    pub(crate) heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) taps: u32,
    pub(crate) layer: u32,
    pub(crate) layers: u32,
    pub(crate) eps: f32,
    pub(crate) query_scale: f32,
    pub(crate) first_row: u32,
    pub(crate) first_chunk: u32,
}

/// `mla/params.h`: query tokens against key ranges.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct AttendItem {
    pub(crate) first_token: u32,
    pub(crate) tokens: u32,
    pub(crate) first_position: u32,
    pub(crate) first_range: u32,
    pub(crate) ranges: u32,
    pub(crate) part: u32,
}

/// `mla/params.h`: keys of some positions.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct AttendRange {
    pub(crate) pages: u32,
    pub(crate) first_page: u32,
    pub(crate) start: u32,
    pub(crate) end: u32,
}

/// `mla/params.h`: parts to be merged.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct AttendMerge {
    pub(crate) first_token: u32,
    pub(crate) tokens: u32,
    pub(crate) first_part: u32,
    pub(crate) parts: u32,
}

/// `mla/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlaStoreParams {
    pub(crate) projected: u64,
    pub(crate) norm: u64,
    pub(crate) latents: u64,
    pub(crate) queries: u64,
    pub(crate) places: u64,
    pub(crate) pitch: u32,
    pub(crate) kv_offset: u32,
    pub(crate) heads: u32,
    pub(crate) nope: u32,
    pub(crate) rope: u32,
    pub(crate) latent: u32,
    pub(crate) eps: f32,
    pub(crate) query_pitch: u32,
    pub(crate) query_source: u64,
}

/// `mla/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlaAbsorbParams {
    pub(crate) store: MlaStoreParams,
    pub(crate) weight: u64,
    pub(crate) value: u32,
    pub(crate) reserved: u32,
}

/// `mla/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlaValuesParams {
    pub(crate) latents: u64,
    pub(crate) weight: u64,
    pub(crate) out: u64,
    pub(crate) heads: u32,
    pub(crate) nope: u32,
    pub(crate) value: u32,
    pub(crate) latent: u32,
}

/// `mla/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlaAttendParams {
    pub(crate) queries: u64,
    pub(crate) latents: u64,
    pub(crate) output: u64,
    pub(crate) lse: u64,
    pub(crate) part_output: u64,
    pub(crate) part_lse: u64,
    pub(crate) items: u64,
    pub(crate) ranges: u64,
    pub(crate) pages: u64,
    pub(crate) merges: u64,
    pub(crate) heads: u32,
    pub(crate) latent: u32,
    pub(crate) rope: u32,
    pub(crate) part_rows: u32,
    pub(crate) scale: f32,
    pub(crate) reserved: u32,
}

/// `mla/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlaDecodeParams {
    pub(crate) latents: TensorMap,
    pub(crate) attend: MlaAttendParams,
    pub(crate) first_items: u64,
    pub(crate) reserved: [u32; 4],
}

/// `mla/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlaMergeParams {
    pub(crate) output: u64,
    pub(crate) lse: u64,
    pub(crate) other_output: u64,
    pub(crate) other_lse: u64,
    pub(crate) latent: u32,
    pub(crate) reserved: u32,
}

/// `mla/params.h`: keys of one page that go to a stretch.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct GatherRun {
    pub(crate) place: u32,
    pub(crate) row: u32,
    pub(crate) keys: u32,
}

/// `mla/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlaGatherParams {
    pub(crate) latents: u64,
    pub(crate) out: u64,
    pub(crate) runs: u64,
    pub(crate) pieces: u32,
    pub(crate) reserved: u32,
}

/// `mla/params.h`: query tokens against the keys of one stretch.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct ExpandedItem {
    pub(crate) first_token: u32,
    pub(crate) tokens: u32,
    pub(crate) first_position: u32,
    pub(crate) first_key: u32,
    pub(crate) first_row: u32,
    pub(crate) keys: u32,
    pub(crate) flags: u32,
}

/// `mla/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlaExpandedParams {
    pub(crate) queries: TensorMap,
    pub(crate) expanded: TensorMap,
    pub(crate) latents: TensorMap,
    pub(crate) output: u64,
    pub(crate) lse: u64,
    pub(crate) values: u64,
    pub(crate) items: u64,
    pub(crate) heads: u32,
    pub(crate) value_pitch: u32,
    pub(crate) scale: f32,
    pub(crate) reserved: [u32; 5],
}

/// `moe/params.h`: rows of one expert.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeTile {
    pub(crate) expert: u32,
    pub(crate) first: u32,
    pub(crate) rows: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeRouterParams {
    pub(crate) x: u64,
    pub(crate) weight: u64,
    pub(crate) scores: u64,
    pub(crate) tokens: u32,
    pub(crate) experts: u32,
    pub(crate) hidden: u32,
    pub(crate) parts: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeSelectParams {
    pub(crate) scores: u64,
    pub(crate) bias: u64,
    pub(crate) forced: u64,
    pub(crate) own: u64,
    pub(crate) live: u64,
    pub(crate) chosen: u64,
    pub(crate) weights: u64,
    pub(crate) tokens: u32,
    pub(crate) experts: u32,
    pub(crate) top_k: u32,
    pub(crate) groups: u32,
    pub(crate) top_groups: u32,
    pub(crate) renormalize: u32,
    pub(crate) scale: f32,
    pub(crate) shared: u32,
    pub(crate) parts: u32,
    pub(crate) reserved: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeSortParams {
    pub(crate) chosen: u64,
    pub(crate) source: u64,
    pub(crate) position: u64,
    pub(crate) tiles: u64,
    pub(crate) tile_count: u64,
    pub(crate) touched: u64,
    pub(crate) entries: u32,
    pub(crate) experts: u32,
    pub(crate) tile_rows: u32,
    pub(crate) routed: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeRouteParams {
    pub(crate) router: MoeRouterParams,
    pub(crate) select: MoeSelectParams,
    pub(crate) sort: MoeSortParams,
    pub(crate) norm: NormParams,
    pub(crate) arrived: u64,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeSpreadParams {
    pub(crate) chosen: u64,
    pub(crate) source: u64,
    pub(crate) position: u64,
    pub(crate) tiles: u64,
    pub(crate) tile_count: u64,
    pub(crate) touched: u64,
    pub(crate) counts: u64,
    pub(crate) entries: u32,
    pub(crate) experts: u32,
    pub(crate) tile_rows: u32,
    pub(crate) routed: u32,
    pub(crate) block_entries: u32,
    pub(crate) reserved: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeProductParams {
    pub(crate) input: u64,
    pub(crate) weight: u64,
    pub(crate) out: u64,
    pub(crate) source: u64,
    pub(crate) tiles: u64,
    pub(crate) tile_count: u64,
    pub(crate) depth: u32,
    pub(crate) width: u32,
    pub(crate) top_k: u32,
    pub(crate) reserved: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeSingleParams {
    pub(crate) input: u64,
    pub(crate) weight: u64,
    pub(crate) out: u64,
    pub(crate) chosen: u64,
    pub(crate) weights: u64,
    pub(crate) depth: u32,
    pub(crate) width: u32,
    pub(crate) choices: u32,
    pub(crate) shared: u32,
    pub(crate) experts: u32,
    pub(crate) stages: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeWideParams {
    pub(crate) weight: TensorMap,
    pub(crate) rows: TensorMap,
    pub(crate) out: u64,
    pub(crate) tiles: u64,
    pub(crate) tile_count: u64,
    pub(crate) depth: u32,
    pub(crate) width: u32,
    pub(crate) reserved: [u32; 8],
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeGatherParams {
    pub(crate) x: u64,
    pub(crate) out: u64,
    pub(crate) source: u64,
    pub(crate) rows: u64,
    pub(crate) pieces: u32,
    pub(crate) top_k: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeCombineParams {
    pub(crate) rows: u64,
    pub(crate) shared: u64,
    pub(crate) position: u64,
    pub(crate) weights: u64,
    pub(crate) out: u64,
    pub(crate) hidden: u32,
    pub(crate) top_k: u32,
}

/// `moe/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct MoeCombineNormParams {
    pub(crate) combine: MoeCombineParams,
    pub(crate) norm: NormParams,
}

/// `sample/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct SampleRow {
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    pub(crate) log_min_p: f64,
    pub(crate) seed: u64,
    pub(crate) position: u64,
    pub(crate) choice: u32,
    pub(crate) top_k: u32,
    pub(crate) repetition: f32,
    pub(crate) frequency: f32,
    pub(crate) presence: f32,
    pub(crate) first_change: u32,
    pub(crate) changes: u32,
    pub(crate) mask: u32,
    pub(crate) alternatives: u32,
    pub(crate) flags: u32,
}

/// `sample/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct SampleChange {
    pub(crate) token: u32,
    pub(crate) output: u32,
    pub(crate) bias: f32,
    pub(crate) flags: u32,
    pub(crate) raw: f32,
}

/// `sample/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct SampleResult {
    pub(crate) normaliser: f64,
    pub(crate) token: u32,
    pub(crate) status: u32,
    pub(crate) margin: f32,
    pub(crate) logprob: f32,
    pub(crate) found: u32,
    pub(crate) reserved: u32,
    pub(crate) tokens: [u32; 20],
    pub(crate) logprobs: [f32; 20],
}

/// `sample/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct FeedParams {
    pub(crate) results: u64,
    pub(crate) from: u64,
    pub(crate) tokens: u64,
    pub(crate) count: u32,
    pub(crate) reserved: u32,
}

/// `sample/params.h`
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct SampleParams {
    pub(crate) logits: u64,
    pub(crate) rows: u64,
    pub(crate) changes: u64,
    pub(crate) masks: u64,
    pub(crate) cuts: u64,
    pub(crate) parts: u64,
    pub(crate) results: u64,
    pub(crate) vocab: u32,
    pub(crate) parts_per_row: u32,
}
