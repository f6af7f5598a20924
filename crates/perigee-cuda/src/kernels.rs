//! Every kernel the backend launches, resolved once when it opens: for the kernels that exist in two activation types, the
//! one of the backend's type. A missing kernel is found here, not in the middle of a step.

use std::sync::Arc;

use perigee_backend::{DType, Result};

use crate::formula::{Fault, Formula};
use crate::module::{Kernel, Modules};
use crate::needs::KDA_HEAD_DIMS;
use crate::ops::dense::{RING_BYTES, ring_bytes};
use crate::ops::sample::RANK_SHARED;
use crate::params::{
    ElementParams, FeedParams, GatherParams, KdaParams, LoadParams, MlaAbsorbParams, MlaAttendParams, MlaDecodeParams,
    MlaExpandedParams, MlaGatherParams, MlaMergeParams, MlaStoreParams, MlaValuesParams, MoeCombineNormParams,
    MoeCombineParams, MoeGatherParams, MoeProductParams, MoeRouteParams, MoeRouterParams, MoeSelectParams,
    MoeSingleParams, MoeSortParams, MoeSpreadParams, MoeWideParams, NormParams, NormedProductParams, SampleParams,
    SkinnyParams, StateSumParams,
};

/// Dynamic shared memory of a block of the router on tensor cores: `Shared` of moe_router_tensor.cu, which asserts it.
pub(crate) const ROUTER_SHARED: usize = 4 * 2 * 64 * 72 * 2;

/// Dynamic shared memory of a block of the router with the norm: `Shared` of moe_norm_router.cu, which asserts it.
pub(crate) const NORM_ROUTER_SHARED: usize = (32 + 64) * 392 * 2;

/// The kernels of one backend. Fields are dropped in order, so the modules go last.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) load_fp32: Kernel<LoadParams>,
    pub(crate) load_bf16: Kernel<LoadParams>,
    pub(crate) rms_norm: Kernel<NormParams>,
    /// Of the residual stream, which is float32.
    pub(crate) rms_norm_stream: Kernel<NormParams>,
    pub(crate) gather: Kernel<GatherParams>,
    pub(crate) gather_widened: Kernel<GatherParams>,
    pub(crate) convert_bf16: Kernel<ElementParams>,
    pub(crate) silu_mul: Kernel<ElementParams>,
    pub(crate) kda_recurrent: Kernel<KdaParams>,
    pub(crate) kda_conv: Kernel<KdaParams>,
    pub(crate) kda_tails: Kernel<KdaParams>,
    pub(crate) kda_gate: Kernel<KdaParams>,
    pub(crate) kda_fast: Vec<KdaFast>,
    pub(crate) mla_store: Kernel<MlaStoreParams>,
    pub(crate) mla_attention: AttentionKernels,
    /// With bfloat16 activations only.
    pub(crate) mla_expanded: Option<MlaExpanded>,
    /// With bfloat16 activations only.
    pub(crate) mla_few: Option<MlaFew>,
    pub(crate) mla_merge_other: Kernel<MlaMergeParams>,
    pub(crate) moe_router_tile: Kernel<MoeRouterParams>,
    /// With weights in bfloat16, as activations are.
    pub(crate) moe_router_tensor: Option<Kernel<MoeRouterParams>>,
    pub(crate) moe_select: Kernel<MoeSelectParams>,
    pub(crate) moe_sort: Kernel<MoeSortParams>,
    /// Selection and sort of some dozen tokens.
    pub(crate) moe_select_many: Kernel<MoeRouteParams>,
    /// The router of some dozen tokens with the norm ahead of it; with bfloat16 activations only.
    pub(crate) moe_norm_router: Option<Kernel<MoeRouteParams>>,
    /// Router, selection and sort of a few tokens.
    pub(crate) moe_route: Kernel<MoeRouteParams>,
    /// The same of one token with the norm ahead of them; with bfloat16 activations only.
    pub(crate) moe_norm_route: Option<Kernel<MoeRouteParams>>,
    pub(crate) moe_gate_up: Kernel<MoeProductParams>,
    pub(crate) moe_down: Kernel<MoeProductParams>,
    /// For experts of few rows each whose sizes the next ones do not fit; with bfloat16 activations only.
    pub(crate) moe_tensor: Option<MoeTensor>,
    /// For experts of few rows each, by ascending weight rows of a block; with bfloat16 activations only.
    pub(crate) moe_skinny: Vec<MoeTensor>,
    /// The last of them for many tokens.
    pub(crate) moe_skinny_many: Option<MoeTensor>,
    /// For steps of many rows an expert; with bfloat16 activations only.
    pub(crate) moe_wide: Option<MoeWide>,
    pub(crate) moe_combine: Kernel<MoeCombineParams>,
    pub(crate) moe_combine_norm: Kernel<MoeCombineNormParams>,
    /// The experts' products of one token; with bfloat16 activations only.
    pub(crate) moe_single: Option<MoeSingle>,
    /// Dense products of one token, by ascending depth; with bfloat16 activations only.
    pub(crate) single: Vec<Single>,
    /// The same of up to [`NORMED_DEPTH`] numbers with the norm of the residual stream ahead of it.
    pub(crate) single_normed: Option<Kernel<NormedProductParams>>,
    /// Dense products with few tokens, by ascending tokens; with bfloat16 activations only.
    pub(crate) skinny: Vec<Skinny>,
    pub(crate) sample_logprobs: Kernel<SampleParams>,
    pub(crate) sample_prepare: Kernel<SampleParams>,
    pub(crate) sample_filter: Kernel<SampleParams>,
    pub(crate) sample_draw: Kernel<SampleParams>,
    pub(crate) sample_finish: Kernel<SampleParams>,
    pub(crate) sample_feed: Kernel<FeedParams>,
    pub(crate) state_sums: Kernel<StateSumParams>,
    modules: Arc<Modules>,
}

/// The kernels of one KDA head size: the chunked form and the fused step.
#[derive(Debug)]
pub(crate) struct KdaFast {
    pub(crate) head_dim: usize,
    pub(crate) chunk: Kernel<KdaParams>,
    pub(crate) chunk_shared: usize,
    pub(crate) scan: Kernel<KdaParams>,
    pub(crate) scan_shared: usize,
    pub(crate) scan_threads: u32,
    pub(crate) decode: Kernel<KdaParams>,
    /// The fused step for many rows.
    pub(crate) decode_bulk: Option<Kernel<KdaParams>>,
    /// The fused step for few rows, with the gates' product in it and a head shared out over [`Self::SPLIT`] blocks.
    pub(crate) decode_split: Option<Kernel<KdaParams>>,
    /// Shared memory of `decode_bulk`: the state of a head.
    pub(crate) state_shared: usize,
}

impl KdaFast {
    /// Blocks of a cluster that share a head, and taps of the convolution (kda_decode_split.cu).
    pub(crate) const SPLIT: usize = 4;
    pub(crate) const SPLIT_TAPS: usize = 4;

    fn load(modules: &Modules, suffix: &str, head_dim: usize, formula: Formula) -> Result<Self> {
        let decode_fault = formula.suffix(&[Fault::DecayAfterRead, Fault::RoundedState, Fault::SiluGate]);
        let chunk_fault = formula.suffix(&[Fault::DecayAfterRead]);
        let scan_fault = formula.suffix(&[Fault::RoundedState]);
        let is_bf16 = suffix == "bf16";
        // Sizes of the structures `Shared` of kda_chunk.cu and kda_chunk_tensor.cu and `ScanShared` of kda_scan.cu, which
        // assert them.
        let column = 64 * (head_dim + 4) * 4;
        let (module, chunk_shared) = if is_bf16 {
            let rows = 2 * 64 * (head_dim + 8) * 2 + 64 * (head_dim + 8) * 4;
            ("kda_chunk_tensor", rows + 2 * 64 * 68 * 4 + 4 * 64 * 4 + 4 * head_dim * 4 + 4)
        } else {
            ("kda_chunk", 3 * column + 64 * 64 * 4 + 3 * 64 * 4 + 4 * head_dim * 4)
        };
        let stage = (3 * 64 * (head_dim + 8) + 64 * 72) * 2 + 64 * 40 * 4 + head_dim * 4;
        let scan_shared = if is_bf16 { 3 * stage + (head_dim + 64) * 40 * 2 + 24 } else { 0 };
        let kernels = Self {
            head_dim,
            chunk: modules.overlapping(module, &format!("kda_chunk_{suffix}_{head_dim}{chunk_fault}"))?,
            chunk_shared,
            scan: modules.overlapping("kda_scan", &format!("kda_scan_{suffix}_{head_dim}{scan_fault}"))?,
            scan_shared,
            scan_threads: if is_bf16 { 288 } else { 128 },
            decode: modules.overlapping("kda_decode", &format!("kda_decode_{suffix}_{head_dim}{decode_fault}"))?,
            decode_bulk: match (head_dim, decode_fault.is_empty()) {
                (128, true) => Some(modules.overlapping("kda_decode_bulk", &format!("kda_decode_bulk_{suffix}_128"))?),
                _ => None,
            },
            decode_split: match (head_dim, is_bf16 && decode_fault.is_empty()) {
                (128, true) => Some(modules.overlapping("kda_decode_split", "kda_decode_split_bf16_128")?),
                _ => None,
            },
            state_shared: head_dim * head_dim * 4,
        };
        if let Some(bulk) = &kernels.decode_bulk {
            bulk.allow_shared(kernels.state_shared)?;
        }
        kernels.chunk.allow_shared(chunk_shared)?;
        kernels.scan.allow_shared(scan_shared)?;
        Ok(kernels)
    }
}

/// Attention over paged latents: by warps for any shape, on tensor cores for some, and the merge of an item's splits.
#[derive(Debug, Clone)]
pub(crate) struct AttentionKernels {
    pub(crate) general: Kernel<MlaAttendParams>,
    /// By ascending query rows of a block; with bfloat16 activations only.
    pub(crate) tensor: Vec<MlaTensor>,
    /// Of single tokens, with bfloat16 activations.
    pub(crate) decode: Option<MlaDecode>,
    pub(crate) merge_splits: Kernel<MlaAttendParams>,
    /// The same for few tokens of which each has many parts.
    pub(crate) merge_many: Kernel<MlaAttendParams>,
    /// The same by more blocks, each of fewer channels.
    pub(crate) merge_wide: Kernel<MlaAttendParams>,
}

impl AttentionKernels {
    fn load(modules: &Modules, suffix: &str, precision: DType) -> Result<Self> {
        Ok(Self {
            general: modules.kernel("mla_attend", &format!("mla_attend_{suffix}"))?,
            tensor: match precision {
                DType::Bf16 => vec![MlaTensor::load(modules, 32, 2)?, MlaTensor::load(modules, 64, 3)?],
                DType::Fp32 => Vec::new(),
            },
            decode: match precision {
                DType::Bf16 => Some(MlaDecode::load(modules)?),
                DType::Fp32 => None,
            },
            merge_splits: modules.overlapping("mla_merge", "mla_merge_splits")?,
            merge_many: modules.overlapping("mla_merge", "mla_merge_many")?,
            merge_wide: modules.overlapping("mla_merge", "mla_merge_wide")?,
        })
    }
}

/// Attention on tensor cores, for one shape of the cache.
#[derive(Debug, Clone)]
pub(crate) struct MlaTensor {
    pub(crate) latent: usize,
    pub(crate) rope: usize,
    /// Query rows of a block.
    pub(crate) rows: usize,
    pub(crate) attend: Kernel<MlaAttendParams>,
    pub(crate) shared: usize,
}

impl MlaTensor {
    fn load(modules: &Modules, rows: usize, stages: usize) -> Result<Self> {
        // The size of the structure `Shared` of mla_attend_tensor.cu, which asserts it.
        let parts = 8 / (rows / 16);
        let shared = (rows + stages * 32) * 584 * 2 + rows * 40 * 2 + 2 * parts * rows * 4;
        let attend = modules.overlapping("mla_attend_tensor", &format!("mla_attend_tensor_{rows}"))?;
        attend.allow_shared(shared)?;
        Ok(Self { latent: 512, rope: 64, rows, attend, shared })
    }
}

/// Attention of single tokens by persistent blocks, for one shape of the cache.
#[derive(Debug, Clone)]
pub(crate) struct MlaDecode {
    pub(crate) latent: usize,
    pub(crate) rope: usize,
    /// Most heads.
    pub(crate) heads: usize,
    pub(crate) attend: Kernel<MlaDecodeParams>,
    pub(crate) shared: usize,
}

impl MlaDecode {
    fn load(modules: &Modules) -> Result<Self> {
        // The size of the structure `Shared` of mla_decode.cu, which asserts it.
        let shared = 7 * 3 * 64 * 128 + 9 * 32 * 128 + 2 * 32 * 128 + 4 * 1024;
        let attend = modules.overlapping("mla_decode", "mla_decode")?;
        attend.allow_shared(shared)?;
        Ok(Self { latent: 512, rope: 64, heads: 32, attend, shared })
    }
}

/// Attention in the expanded form.
#[derive(Debug)]
pub(crate) struct MlaExpanded {
    pub(crate) gather: Kernel<MlaGatherParams>,
    pub(crate) attend: Kernel<MlaExpandedParams>,
    pub(crate) shared: usize,
}

impl MlaExpanded {
    fn load(modules: &Modules) -> Result<Self> {
        // The size of the structure `Shared` of mla_expanded.cu, which asserts it.
        let shared = (3 + 2 * 5) * 128 * 128 + 1024;
        let attend = modules.overlapping("mla_expanded", "mla_attend_expanded")?;
        attend.allow_shared(shared)?;
        Ok(Self { gather: modules.overlapping("mla_expanded", "mla_gather")?, attend, shared })
    }
}

/// The products with the latent's weights for few tokens.
#[derive(Debug)]
pub(crate) struct MlaFew {
    pub(crate) absorb: Kernel<MlaAbsorbParams>,
    pub(crate) values: Kernel<MlaValuesParams>,
}

impl MlaFew {
    /// Most tokens: each of them reads the weights.
    pub(crate) const TOKENS: usize = 4;
    /// Longest key without its "rope" channels, longest latent, channels of the latent of a block, and values of a block (mla_few.cu).
    pub(crate) const NOPE: usize = 128;
    pub(crate) const LATENT: usize = 512;
    pub(crate) const COLUMNS: usize = 128;
    pub(crate) const VALUES: usize = 32;

    fn load(modules: &Modules) -> Result<Self> {
        Ok(Self {
            absorb: modules.overlapping("mla_few", "mla_absorb_few_bf16")?,
            values: modules.overlapping("mla_few", "mla_values_few_bf16")?,
        })
    }
}

/// Grouped products on tensor cores, for one number of rows of a tile.
#[derive(Debug)]
pub(crate) struct MoeTensor {
    pub(crate) rows: usize,
    /// Weight rows of a block.
    pub(crate) columns: usize,
    pub(crate) gate_up: Kernel<MoeProductParams>,
    pub(crate) down: Kernel<MoeProductParams>,
    /// Whether blocks take tiles in turn, so that a grid need not be as high as the list of tiles can be long.
    pub(crate) takes_turns: bool,
    pub(crate) shared: usize,
}

/// Warps of a block that multiplies one token, each with a ring of rows; and the least and the most rows of a ring (gemm/single.cuh).
pub(crate) const RING_WARPS: usize = 8;
pub(crate) const RING_STAGES: (usize, usize) = (3, 8);

/// Longest token that is normed on the way to its product, by the pieces of single.cu.
pub(crate) const NORMED_DEPTH: usize = 9 * 256;

/// Dense products of one token of up to `depth` numbers.
#[derive(Debug)]
pub(crate) struct Single {
    pub(crate) depth: usize,
    pub(crate) result: DType,
    pub(crate) kernel: Kernel<SkinnyParams>,
}

impl Single {
    /// By pieces of 8 numbers a lane.
    fn load(modules: &Modules, pieces: usize, result: DType) -> Result<Self> {
        let depth = pieces * 256;
        let suffix = if result == DType::Bf16 { "bf16" } else { "fp32" };
        let kernel = modules.overlapping("single", &format!("single_{suffix}_{pieces}"))?;
        kernel.allow_shared(most_ring(depth))?;
        Ok(Self { depth, result, kernel })
    }
}

/// The experts' products of one token.
#[derive(Debug)]
pub(crate) struct MoeSingle {
    pub(crate) gate_up: Kernel<MoeSingleParams>,
    pub(crate) down: Kernel<MoeSingleParams>,
    /// The same by pieces of [`Self::GROUP`] neighbouring channels.
    pub(crate) down_grouped: Kernel<MoeSingleParams>,
}

impl MoeSingle {
    /// Widest token of gate and up, and of down, by the pieces of moe_product_single.cu.
    pub(crate) const MOST: (usize, usize) = (9 * 256, 4 * 256);
    /// Most experts of a token, and most products of a block of down.
    pub(crate) const MOST_CHOICES: usize = 32;
    pub(crate) const MOST_DOTS: usize = 512;
    /// Channels of a piece of `down_grouped`, and pieces of a warp's ring: the most that leave room for a block of the product ahead, or
    /// behind, where experts are 1,024 wide.
    pub(crate) const GROUP: usize = 3;
    pub(crate) const GROUP_STAGES: usize = 2;

    fn load(modules: &Modules) -> Result<Self> {
        let gate_up = modules.overlapping("moe_product_single", "moe_gate_up_single")?;
        let down = modules.overlapping("moe_product_single", "moe_down_single")?;
        let down_grouped = modules.overlapping("moe_product_single", "moe_down_single_3")?;
        gate_up.allow_shared(most_ring(Self::MOST.0))?;
        let inner = Self::MOST_CHOICES * Self::MOST.1 * 2;
        down.allow_shared(most_ring(Self::MOST.1) + inner)?;
        down_grouped.allow_shared(ring_bytes(Self::GROUP_STAGES, Self::GROUP * Self::MOST.1) + inner)?;
        Ok(Self { gate_up, down, down_grouped })
    }
}

/// Most bytes of the rings of a block for tokens of up to `depth` numbers.
fn most_ring(depth: usize) -> usize {
    ring_bytes(RING_STAGES.0, depth).max(RING_BYTES)
}

/// A dense product with few tokens, for one number of tokens and one of weight rows of a block.
#[derive(Debug)]
pub(crate) struct Skinny {
    pub(crate) tokens: usize,
    /// Weight rows of a block.
    pub(crate) rows: usize,
    pub(crate) to_bf16: Kernel<SkinnyParams>,
    pub(crate) to_fp32: Kernel<SkinnyParams>,
    pub(crate) shared: usize,
}

impl Skinny {
    fn load(modules: &Modules, tokens: usize, row_warps: usize, ahead: usize) -> Result<Self> {
        // The size of the buffers of gemm/skinny.cuh, which skinny.cu asserts.
        let shared = 2 * tokens * (64 * ahead * (8 / row_warps) + 32) * 2;
        let to_bf16 = modules.overlapping("skinny", &format!("skinny_bf16_{tokens}_{row_warps}"))?;
        let to_fp32 = modules.overlapping("skinny", &format!("skinny_fp32_{tokens}_{row_warps}"))?;
        to_bf16.allow_shared(shared)?;
        to_fp32.allow_shared(shared)?;
        Ok(Self { tokens, rows: 16 * row_warps, to_bf16, to_fp32, shared })
    }
}

impl MoeTensor {
    /// For experts of few rows each.
    fn skinny(modules: &Modules, row_warps: usize, takes_turns: bool) -> Result<Self> {
        // The size of the buffers of gemm/skinny.cuh for 32 tokens, which moe_product_skinny.cu asserts.
        let shared = 2 * 32 * (64 * 3 * (8 / row_warps) + 32) * 2;
        let suffix = if takes_turns { "_turns" } else { "" };
        let load = |name: &str| {
            modules.overlapping_with("moe_product_skinny", &format!("moe_{name}_skinny_{row_warps}{suffix}"), shared)
        };
        let (gate_up, down) = (load("gate_up")?, load("down")?);
        Ok(Self { rows: 32, columns: 16 * row_warps, gate_up, down, takes_turns, shared })
    }

    fn load(modules: &Modules, rows: usize, stages: usize) -> Result<Self> {
        // The size of the structure `Shared` of moe_product_tensor.cu, which asserts it.
        let shared = stages * (rows + 128) * 72 * 2;
        let gate_up = modules.overlapping("moe_product_tensor", &format!("moe_gate_up_tensor_{rows}"))?;
        let down = modules.overlapping("moe_product_tensor", &format!("moe_down_tensor_{rows}"))?;
        gate_up.allow_shared(shared)?;
        down.allow_shared(shared)?;
        Ok(Self { rows, columns: 128, gate_up, down, takes_turns: false, shared })
    }
}

/// Grouped products for many rows an expert, and the sort that makes their tiles.
#[derive(Debug)]
pub(crate) struct MoeWide {
    pub(crate) count: Kernel<MoeSpreadParams>,
    pub(crate) spread: Kernel<MoeSpreadParams>,
    pub(crate) gather: Kernel<MoeGatherParams>,
    pub(crate) combine: Kernel<MoeCombineParams>,
    /// By ascending rows of a tile.
    pub(crate) products: [WideProduct; 2],
}

/// The products for one number of rows of a tile.
#[derive(Debug)]
pub(crate) struct WideProduct {
    pub(crate) rows: usize,
    pub(crate) gate_up: Kernel<MoeWideParams>,
    pub(crate) down: Kernel<MoeWideParams>,
    pub(crate) shared: usize,
}

impl MoeWide {
    fn load(modules: &Modules) -> Result<Self> {
        Ok(Self {
            count: modules.overlapping("moe_sort_wide", "moe_count")?,
            spread: modules.overlapping("moe_sort_wide", "moe_spread")?,
            gather: modules.overlapping("moe_sort_wide", "moe_gather")?,
            combine: modules.overlapping("moe_sort_wide", "moe_combine_wide")?,
            products: [WideProduct::load(modules, 64, 8)?, WideProduct::load(modules, 288, 4)?],
        })
    }
}

impl WideProduct {
    fn load(modules: &Modules, rows: usize, stages: usize) -> Result<Self> {
        // The size of the structure `Shared` of moe_product_wide.cu, which asserts it.
        let shared = stages * (128 + rows) * 128 + 8 * 2 * 512 + 1024;
        let gate_up = modules.overlapping("moe_product_wide", &format!("moe_gate_up_wide_{rows}"))?;
        let down = modules.overlapping("moe_product_wide", &format!("moe_down_wide_{rows}"))?;
        gate_up.allow_shared(shared)?;
        down.allow_shared(shared)?;
        Ok(Self { rows, gate_up, down, shared })
    }
}

impl Kernels {
    pub(crate) fn find(modules: Arc<Modules>, precision: DType, formula: Formula) -> Result<Self> {
        let suffix = match precision {
            DType::Bf16 => "bf16",
            DType::Fp32 => "fp32",
        };
        let typed = |name: &str| format!("{name}_{suffix}");
        let kda_fault = formula.suffix(&[Fault::DecayAfterRead, Fault::RoundedState, Fault::SiluGate]);
        let gate_fault = formula.suffix(&[Fault::SiluGate]);
        let store_fault = formula.suffix(&[Fault::Rotary]);
        let select_fault = formula.suffix(&[Fault::BiasedWeights]);
        Ok(Self {
            load_fp32: modules.kernel("load", "load_rows_fp32")?,
            load_bf16: modules.kernel("load", "load_rows_bf16")?,
            rms_norm: modules.overlapping("norm", &typed("rms_norm"))?,
            rms_norm_stream: modules.overlapping("norm", &typed("rms_norm_stream"))?,
            gather: modules.overlapping("embed", &typed("gather"))?,
            gather_widened: modules.kernel("embed", &typed("gather_widened"))?,
            convert_bf16: modules.overlapping("elements", "convert_bf16")?,
            silu_mul: modules.overlapping("elements", &typed("silu_mul"))?,
            kda_recurrent: modules.kernel("kda_recurrent", &(typed("kda_recurrent") + kda_fault))?,
            kda_conv: modules.overlapping("kda_conv", &typed("kda_conv"))?,
            kda_tails: modules.overlapping("kda_conv", &typed("kda_tails"))?,
            kda_gate: modules.overlapping("kda_conv", &(typed("kda_gate") + gate_fault))?,
            kda_fast: KDA_HEAD_DIMS
                .iter()
                .map(|&dim| KdaFast::load(&modules, suffix, dim, formula))
                .collect::<Result<_>>()?,
            mla_store: modules.overlapping("mla_store", &(typed("mla_store") + store_fault))?,
            mla_attention: AttentionKernels::load(&modules, suffix, precision)?,
            mla_expanded: match precision {
                DType::Bf16 => Some(MlaExpanded::load(&modules)?),
                DType::Fp32 => None,
            },
            mla_few: match precision {
                DType::Bf16 => Some(MlaFew::load(&modules)?),
                DType::Fp32 => None,
            },
            mla_merge_other: modules.kernel("mla_merge", "mla_merge_other")?,
            moe_router_tile: modules.overlapping("moe_router", &typed("moe_router_tile"))?,
            moe_router_tensor: match precision {
                DType::Bf16 => {
                    Some(modules.overlapping_with("moe_router_tensor", "moe_router_tensor", ROUTER_SHARED)?)
                }
                DType::Fp32 => None,
            },
            moe_select: modules.overlapping("moe_select", &format!("moe_select{select_fault}"))?,
            moe_sort: modules.overlapping("moe_select", "moe_sort")?,
            moe_select_many: modules.overlapping("moe_select_many", "moe_select_many")?,
            moe_norm_router: match precision {
                DType::Bf16 => {
                    Some(modules.overlapping_with("moe_norm_router", "moe_norm_router", NORM_ROUTER_SHARED)?)
                }
                DType::Fp32 => None,
            },
            moe_route: modules.overlapping("moe_route", &typed("moe_route"))?,
            moe_norm_route: match precision {
                DType::Bf16 => Some(modules.overlapping("moe_route", "moe_norm_route_bf16")?),
                DType::Fp32 => None,
            },
            moe_gate_up: modules.kernel("moe_product", &typed("moe_gate_up"))?,
            moe_down: modules.kernel("moe_product", &typed("moe_down"))?,
            moe_tensor: match precision {
                DType::Bf16 => Some(MoeTensor::load(&modules, 16, 5)?),
                DType::Fp32 => None,
            },
            moe_skinny: match precision {
                DType::Bf16 => vec![MoeTensor::skinny(&modules, 4, true)?, MoeTensor::skinny(&modules, 8, true)?],
                DType::Fp32 => Vec::new(),
            },
            moe_skinny_many: match precision {
                DType::Bf16 => Some(MoeTensor::skinny(&modules, 8, false)?),
                DType::Fp32 => None,
            },
            moe_wide: match precision {
                DType::Bf16 => Some(MoeWide::load(&modules)?),
                DType::Fp32 => None,
            },
            moe_combine: modules.overlapping("moe_combine", &typed("moe_combine"))?,
            moe_combine_norm: modules.overlapping("moe_combine", &typed("moe_combine_norm"))?,
            moe_single: match precision {
                DType::Bf16 => Some(MoeSingle::load(&modules)?),
                DType::Fp32 => None,
            },
            single: match precision {
                DType::Bf16 => {
                    let forms = [(9, DType::Bf16), (9, DType::Fp32), (16, DType::Bf16)];
                    let load = |&(pieces, result)| Single::load(&modules, pieces, result);
                    forms.iter().map(load).collect::<Result<_>>()?
                }
                DType::Fp32 => Vec::new(),
            },
            single_normed: match precision {
                DType::Bf16 => Some(modules.overlapping_with("single", "single_normed_9", most_ring(NORMED_DEPTH))?),
                DType::Fp32 => None,
            },
            skinny: match precision {
                DType::Bf16 => {
                    let forms = [(8, 1, 4), (8, 4, 4)];
                    forms
                        .iter()
                        .map(|&(tokens, row_warps, ahead)| Skinny::load(&modules, tokens, row_warps, ahead))
                        .collect::<Result<_>>()?
                }
                DType::Fp32 => Vec::new(),
            },
            sample_logprobs: ranking(&modules, "sample_logprobs")?,
            sample_prepare: modules.kernel("sample_draw", "sample_prepare")?,
            sample_filter: ranking(&modules, "sample_filter")?,
            sample_draw: modules.kernel("sample_draw", "sample_draw")?,
            sample_finish: modules.kernel("sample_draw", "sample_finish")?,
            sample_feed: modules.kernel("sample_feed", "sample_feed")?,
            state_sums: modules.kernel("state_sums", &typed("state_sums"))?,
            modules,
        })
    }

    /// What keeps the kernels loaded, for whoever launches them beside the backend.
    pub(crate) fn modules(&self) -> &Arc<Modules> {
        &self.modules
    }
}

/// A kernel that ranks rows of logits.
fn ranking(modules: &Modules, name: &str) -> Result<Kernel<SampleParams>> {
    let kernel = modules.kernel("sample_filter", name)?;
    kernel.allow_shared(RANK_SHARED)?;
    Ok(kernel)
}
