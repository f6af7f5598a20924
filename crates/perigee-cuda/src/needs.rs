//! Device memory that steps work in, as arithmetic over shapes. It is compiled without a GPU too: ops state their needs from
//! here when they load, and a memory plan is made from the same numbers before a device is touched.

use perigee_backend::{DType, KdaShape, MlaShape, MlpShape, MoeShape, PAGE_TOKENS};

/// Query rows (tokens times heads) of one attention item.
pub(crate) const ITEM_ROWS: usize = 64;
/// Tokens of one chunk of the chunked KDA form.
pub(crate) const CHUNK_TOKENS: usize = 64;
/// Chunks that the working memory holds beyond those of the longest row.
pub(crate) const MORE_CHUNKS: usize = 32;
/// Head sizes that have kernels of their own in the chunked KDA form.
pub(crate) const KDA_HEAD_DIMS: [usize; 3] = [32, 64, 128];
/// Most keys that the expanded form of attention works on together: this many steps' tokens, for which the working memory of KDA has
/// room, and fewer where steps are of few tokens, for which a stretch costs little to begin.
const STRETCH_STEPS: usize = 8;
#[cfg(feature = "cuda")]
const MOST_STRETCH: usize = 65_536;
/// Tokens of a step for each of those.
#[cfg(feature = "cuda")]
const STRETCH_TOKENS: usize = 256;
/// Gate rows and up rows of experts alternate in blocks of this size.
pub(crate) const EXPERT_BLOCK: usize = 8;
/// Bytes of an expert's tile in the list of tiles.
const TILE_BYTES: usize = 12;
/// Rows of the residual stream that have a second place, for kernels whose blocks all read the first.
pub(crate) const MOVED_ROWS: usize = 128;
/// Alignment of the parts of working memory, for which `fixed` leaves room.
const ALIGNMENT: usize = 256;

/// What an op needs for a step of some tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Need {
    /// Bytes for each token.
    pub(crate) per_token: usize,
    /// Bytes besides.
    pub(crate) fixed: usize,
}

impl Need {
    /// Bytes for a step of `tokens` tokens.
    pub(crate) fn bytes(self, tokens: usize) -> usize {
        self.per_token * tokens + self.fixed
    }
}

/// Rows of the KDA input product: q, k, v, both gates' first halves and the write strength, padded to 8.
pub(crate) fn kda_width(shape: &KdaShape) -> usize {
    (3 * shape.heads * shape.head_dim + 2 * shape.head_dim + shape.heads).next_multiple_of(8)
}

/// Numbers of working memory of one (chunk, head) of KDA, padded as `kda/params.h` has it: queries, keys or Wd; U; Pqk.
pub(crate) fn kda_chunk_numbers(head_dim: usize) -> [usize; 3] {
    [CHUNK_TOKENS * (head_dim + 8), CHUNK_TOKENS * head_dim.div_ceil(32) * 40, CHUNK_TOKENS * 72]
}

/// Working memory of one chunk of KDA, all heads.
fn kda_chunk(shape: &KdaShape, element: usize) -> usize {
    let [rows, update, attention] = kda_chunk_numbers(shape.head_dim);
    shape.heads * (3 * rows * element + update * 4 + attention * element + shape.head_dim * 4)
}

/// The KDA mixer.
pub(crate) fn kda(shape: &KdaShape, element: usize) -> Need {
    let channels = shape.heads * shape.head_dim;
    let chunk = if KDA_HEAD_DIMS.contains(&shape.head_dim) { kda_chunk(shape, element) } else { 0 };
    Need {
        per_token: (kda_width(shape) + 4 * channels) * element + 2 * channels * 4 + chunk.div_ceil(CHUNK_TOKENS),
        fixed: (MORE_CHUNKS + 1) * chunk + 16 * ALIGNMENT,
    }
}

/// First row of the latent in the MLA input product, and rows of that product, padded to 8.
pub(crate) fn mla_rows(shape: &MlaShape) -> (usize, usize) {
    let queries = shape.query_rank.unwrap_or(shape.heads * (shape.nope + shape.rope));
    let latent = queries.next_multiple_of(8);
    (latent, (latent + shape.cache_width()).next_multiple_of(8))
}

/// Whether layers of this shape have kernels for the expanded form of attention, with bfloat16 activations.
pub(crate) fn expands(shape: &MlaShape) -> bool {
    (shape.nope, shape.rope, shape.value, shape.latent, shape.query_rank) == (128, 64, 128, 512, None)
}

/// Keys that the expanded form works on together where steps have up to `tokens` tokens.
#[cfg(feature = "cuda")]
pub(crate) fn stretch_keys(tokens: usize) -> usize {
    let steps = (tokens / STRETCH_TOKENS).clamp(1, STRETCH_STEPS);
    (steps * tokens).next_multiple_of(PAGE_TOKENS).clamp(PAGE_TOKENS, MOST_STRETCH)
}

/// The MLA mixer: projections, values, a part that another replica computed, and a stretch of the expanded form.
pub(crate) fn mla(shape: &MlaShape, element: usize) -> [Need; 4] {
    let queries = shape.heads * (shape.nope + shape.rope);
    // Keys, values and latents of a stretch in the expanded form.
    let key = (shape.cache_width() + shape.heads * (shape.nope + shape.value)) * element;
    let expands = expands(shape) && element == DType::Bf16.bytes();
    let key = if expands { key } else { 0 };
    let low_rank = shape.query_rank.map_or(0, |rank| rank.next_multiple_of(8) + queries);
    let fixed = 8 * ALIGNMENT;
    [
        Need { per_token: (mla_rows(shape).1 + low_rank) * element, fixed },
        Need { per_token: shape.heads * (shape.latent + shape.value) * element, fixed },
        Need { per_token: 0, fixed: shape.heads * (shape.latent + 1) * 4 + 4 * ALIGNMENT },
        Need { per_token: STRETCH_STEPS * key, fixed: PAGE_TOKENS * key + 2 * ALIGNMENT },
    ]
}

/// Rows of a partial result of attention.
pub(crate) fn part_rows(heads: usize) -> usize {
    heads.max(ITEM_ROWS)
}

/// Partial results of attention of a step.
pub(crate) fn parts(count: usize, heads: usize, latent: usize) -> usize {
    count * part_rows(heads) * (latent + 1) * 4 + 4 * ALIGNMENT
}

/// A gated MLP.
pub(crate) fn mlp(shape: &MlpShape, element: usize) -> Need {
    Need { per_token: 3 * shape.width * element, fixed: 4 * ALIGNMENT }
}

/// Inner width of an expert, padded with zeros.
pub(crate) fn expert_width(shape: &MoeShape) -> usize {
    shape.width.next_multiple_of(EXPERT_BLOCK)
}

/// Side of a tile of the router's product for many tokens, in tokens and in experts.
pub(crate) const ROUTER_TILE: usize = 64;
/// Blocks of that product that fill a device: tiles, times the parts of the depth that each is computed in.
pub(crate) const ROUTER_BLOCKS: usize = 144;

/// Entries of a block of the sort of many (token, choice) entries.
pub(crate) const SORT_ENTRIES: usize = 2048;

/// Blocks' counts of that sort.
pub(crate) fn sort_counts(entries: usize, experts: usize) -> usize {
    entries.div_ceil(SORT_ENTRIES) * experts * 4
}

/// A mixture of experts with its shared experts.
pub(crate) fn moe(shape: &MoeShape, element: usize) -> Need {
    // Of the sort's counts, an entry's part of a block's.
    let counts = ((shape.experts + 1) * 4).div_ceil(SORT_ENTRIES);
    let entry = 5 * 4 + counts + (expert_width(shape) + shape.hidden) * element + TILE_BYTES;
    let shared = mlp(&MlpShape { hidden: shape.hidden, width: shape.shared_width }, element);
    Need {
        // One entry more for a shared expert that is computed like the routed ones.
        per_token: (shape.top_k + 1) * entry + shape.experts * 4 + shape.hidden * element + shared.per_token,
        // Scores in parts fill no more tiles than there are blocks.
        fixed: (shape.experts + 2) * TILE_BYTES
            + ROUTER_BLOCKS * ROUTER_TILE * ROUTER_TILE * 4
            + 17 * ALIGNMENT
            + sort_counts(1, shape.experts + 1)
            + shared.fixed,
    }
}

/// The output head; `through_host` is the number of this rank's rows where ranks exchange through host memory, else 0.
pub(crate) fn head(hidden: usize, through_host: usize, element: usize) -> Need {
    Need { per_token: hidden * element + through_host * 4, fixed: 4 * ALIGNMENT }
}

/// Shapes of the layers that a rank runs.
#[derive(Debug, Clone, Copy)]
pub struct LayerShapes {
    /// KDA layers.
    pub kda: KdaShape,
    /// MLA layers.
    pub mla: MlaShape,
    /// Dense MLPs.
    pub mlp: MlpShape,
    /// Mixtures of experts.
    pub moe: MoeShape,
}

/// Bytes of working memory for steps of up to `tokens` tokens with activations of this type, partial results of attention
/// included: the largest op's, since ops run one after the other, and the residual stream's second place.
pub fn working_bytes(shapes: &LayerShapes, tokens: usize, precision: DType) -> u64 {
    let element = precision.bytes();
    let [project, values, other, stretch] = mla(&shapes.mla, element);
    let needs = [
        kda(&shapes.kda, element),
        project,
        values,
        other,
        stretch,
        mlp(&shapes.mlp, element),
        moe(&shapes.moe, element),
        head(shapes.mla.hidden, 0, element),
    ];
    let most = needs.iter().map(|need| need.bytes(tokens)).max().unwrap_or(0);
    let moved = MOVED_ROWS * shapes.mla.hidden * DType::Fp32.bytes();
    // Twice what fills a device of up to 160 multiprocessors: more items are not split.
    most.max(parts(2 * 2 * 160, shapes.mla.heads, shapes.mla.latent)) as u64
        + moved as u64
        + widened_bytes(&shapes.moe, precision)
}

/// Bytes of the logits of all ranks in each rank's order, for `rows` rows of at most `head_rows` columns from each of `ranks`.
pub fn gathered_bytes(rows: usize, head_rows: usize, ranks: usize) -> u64 {
    if ranks == 1 { 0 } else { (rows * head_rows * ranks * DType::Fp32.bytes()).next_power_of_two() as u64 }
}

/// Room for a layer's experts in the type of products, where that is wider than the bfloat16 that they are stored in.
fn widened_bytes(shape: &MoeShape, precision: DType) -> u64 {
    match precision {
        DType::Bf16 => 0,
        DType::Fp32 => (shape.experts + 1) as u64 * (3 * expert_width(shape) * shape.hidden * precision.bytes()) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn working_memory_is_that_of_the_largest_op() {
        let shapes = LayerShapes {
            kda: KdaShape { hidden: 2304, heads: 32, head_dim: 128, conv: 4, eps: 1e-5 },
            mla: MlaShape {
                hidden: 2304,
                heads: 32,
                nope: 128,
                rope: 64,
                value: 128,
                latent: 512,
                query_rank: None,
                eps: 1e-6,
            },
            mlp: MlpShape { hidden: 2304, width: 9216 },
            moe: MoeShape {
                hidden: 2304,
                experts: 256,
                top_k: 8,
                groups: 1,
                top_groups: 1,
                renormalize: true,
                scale: 2.446,
                width: 1024,
                shared_width: 1024,
            },
        };
        let kda = kda(&shapes.kda, 2);
        assert_eq!(kda_width(&shapes.kda), 12576);
        assert_eq!(mla_rows(&shapes.mla), (6144, 6720));
        let moved = 128 * 2304 * 4;
        assert_eq!(working_bytes(&shapes, 8192, DType::Bf16), kda.bytes(8192) as u64 + moved);
        // A few tokens: the parts of attention are what counts, or the chunks that KDA always keeps room for.
        let few = working_bytes(&shapes, 1, DType::Bf16);
        assert!((64 << 20..256 << 20).contains(&few), "{few}");
        assert!(working_bytes(&shapes, 8192, DType::Fp32) > working_bytes(&shapes, 8192, DType::Bf16));
    }
}
