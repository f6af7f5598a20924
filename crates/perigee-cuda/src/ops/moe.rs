//! The mixture of experts: router and selection, sort of (token, choice) entries by expert, grouped products, and the sum
//! with the shared experts.

use perigee_backend::weights::{MlpWeights, MoeWeights};
use perigee_backend::{BackendError, DType, MlpShape, MoeShape, Result, Routing, TensorSlice};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::buffer::Buffer;
use crate::exchange::Exchange;
use crate::formula::Fault;
use crate::kernels::{MoeTensor, ROUTER_SHARED};
use crate::loader::{Loader, Placement};
use crate::module::Kernel;
use crate::needs::{self, EXPERT_BLOCK as BLOCK, ROUTER_BLOCKS, ROUTER_TILE};
use crate::ops::mlp::{GatedWeights, Mlp};
use crate::ops::wide::{GATHER_ROWS, WideWeights};
use crate::params::{
    ElementParams, MoeCombineNormParams, MoeCombineParams, MoeProductParams, MoeRouterParams, MoeSelectParams,
    MoeSortParams, MoeTile, NormParams,
};
use crate::stream::Grid;
use crate::tensor::{Matrix, Tensor};
use crate::tuning::tuning;

/// Rows of a grouped product's tile.
const TILE_ROWS: usize = 64;
/// Columns of a grouped product's tile.
const TILE_COLUMNS: usize = 64;
/// Rows an expert, on average, up to which the product is one of reading weights.
const FEW_ROWS: usize = 16;
/// Depth of a step of that product, and weight rows of a block: half as many where blocks would be too few otherwise.
const SKINNY_DEPTH: usize = 64;
const SKINNY_COLUMNS: usize = 128;
/// Rows of the smallest tile.
const LEAST_TILE: usize = 16;
/// Tokens from which the router's depth is cut into parts, and the least depth of a part.
const ROUTER_MANY: usize = 16;
const ROUTER_PART: usize = 128;
/// Depth of a step of it on tensor cores.
const ROUTER_DEPTH: usize = 64;
/// Tokens from which the router is a dense product, where its weights are bfloat16 as stored.
const ROUTER_PRODUCT: usize = 512;
/// Widest row that one block sums and norms.
const MOST_FUSED: usize = 2560;
/// Dynamic shared memory that any block may use without asking.
const PLAIN_SHARED: usize = 48 << 10;

/// A mixture of experts.
#[derive(Debug)]
pub struct Moe {
    pub(crate) shape: MoeShape,
    /// Inner width of an expert, padded to a multiple of [`BLOCK`] with zeros.
    pub(crate) width: usize,
    /// [E, d] float32
    router: Matrix,
    /// The same in bfloat16, where that is how it was stored: products with it are exact, and many tokens go through tensor cores.
    pub(super) narrow_router: Option<Matrix>,
    bias: Buffer,
    /// Shared experts that are as wide as a routed one lie behind the others as one more expert: 1, else 0.
    extra: usize,
    /// [E + extra][2 f][d]: blocks of 8 gate rows, then their 8 up rows.
    gate_up: Matrix,
    /// [E + extra][d][f]
    down: Matrix,
    /// Shared experts of another width.
    shared: Option<Mlp>,
    /// Where the kernels for many rows an expert fit.
    pub(crate) wide: Option<WideWeights>,
}

impl Moe {
    /// 1 where a step of `tokens` tokens has the shared expert computed like the routed ones, which every token has then; else 0.
    fn shared_choices(&self, tokens: usize) -> usize {
        if tokens <= tuning().shared { self.extra } else { 0 }
    }

    /// Experts of a token.
    pub(crate) fn choices(&self, tokens: usize) -> usize {
        self.shape.top_k + self.shared_choices(tokens)
    }

    /// Experts that tokens choose from.
    pub(crate) fn experts(&self, tokens: usize) -> usize {
        self.shape.experts + self.shared_choices(tokens)
    }

    /// Whether shared experts are not computed like the routed ones with few tokens.
    pub(crate) fn has_shared_apart(&self) -> bool {
        self.shared.is_some()
    }

    /// The shared expert as an MLP, where it lies behind the routed ones.
    fn last_expert(&self, weights: &ExpertWeights, precision: DType) -> Option<GatedWeights> {
        let matrix = self.shape.experts * self.width * self.shape.hidden * precision.bytes();
        (self.extra == 1).then(|| GatedWeights {
            gate_up: weights.gate_up + 2 * matrix as u64,
            down: weights.down + matrix as u64,
            block: BLOCK as u32,
        })
    }
}

/// Device addresses of all experts' weights in the type of products.
pub(crate) struct ExpertWeights {
    pub(crate) gate_up: u64,
    pub(crate) down: u64,
}

/// Where the last layer's own selection lies.
#[derive(Debug)]
pub(crate) struct Selected {
    own: Buffer,
    count: usize,
}

/// Working memory of one run, by address.
pub(crate) struct Work {
    scores: u64,
    pub(crate) chosen: u64,
    pub(crate) weights: u64,
    pub(crate) source: u64,
    pub(crate) position: u64,
    pub(crate) tiles: u64,
    pub(crate) tile_count: u64,
    /// Entries of each expert in each block of the sort of many entries.
    pub(crate) counts: u64,
    pub(crate) inner: u64,
    pub(crate) rows: u64,
    shared: u64,
}

impl CudaBackend {
    pub(crate) fn moe_load(&mut self, shape: &MoeShape, weights: &MoeWeights<'_>) -> Result<Moe> {
        check(shape, weights)?;
        let width = needs::expert_width(shape);
        let name = &weights.router.name;
        let router = Loader::matrix(&self.stream, shape.experts, shape.hidden, DType::Fp32, name)?;
        self.loader.place(&self.stream, &self.kernels, &weights.router, &router, Placement::at(0))?;
        let narrow_router = if self.precision == DType::Bf16 && weights.router.dtype == DType::Bf16 {
            Some(self.moe_narrow(&router, shape.hidden)?)
        } else {
            None
        };
        let bias = self.loader.vector(&self.stream, &self.kernels, &weights.bias)?;
        if self.formula.has(Fault::UnbiasedSelection) {
            self.stream.fill(&bias, 0, bias.bytes(), 0)?;
        }
        let extra = usize::from(shape.shared_width == shape.width);
        let experts = shape.experts + extra;
        let gate_up_rows = experts * 2 * width;
        let as_expert = weights.shared.as_ref().filter(|_| extra == 1);
        let dtype = self.stored_type(weights.experts.iter().chain(as_expert));
        let gate_up = Loader::matrix(&self.stream, gate_up_rows, shape.hidden, dtype, "expert gate and up")?;
        let down = Loader::matrix(&self.stream, experts * shape.hidden, width, dtype, "expert down")?;
        for (index, expert) in weights.experts.iter().chain(as_expert).enumerate() {
            let first = index * 2 * width;
            let alternate = |offset| Placement { offset, group: BLOCK, group_pitch: 2 * BLOCK };
            self.loader.place(&self.stream, &self.kernels, &expert.gate, &gate_up, alternate(first))?;
            self.loader.place(&self.stream, &self.kernels, &expert.up, &gate_up, alternate(first + BLOCK))?;
            let rows = Placement::at(index * shape.hidden);
            self.loader.place(&self.stream, &self.kernels, &expert.down, &down, rows)?;
        }
        self.loader.reserve_widened(&self.stream, [&gate_up, &down], self.precision)?;
        let shared_shape = MlpShape { hidden: shape.hidden, width: shape.shared_width };
        let shared = match weights.shared.as_ref().filter(|_| extra == 0) {
            Some(shared) => Some(self.mlp_load(&shared_shape, shared)?),
            None => None,
        };
        self.scratch.require(needs::moe(shape, self.precision.bytes()));
        let wide = self.moe_wide_weights((&gate_up, shape.hidden), (&down, width))?;
        Ok(Moe { shape: *shape, width, router, narrow_router, bias, extra, gate_up, down, shared, wide })
    }

    /// A float32 matrix in bfloat16.
    fn moe_narrow(&self, wide: &Matrix, columns: usize) -> Result<Matrix> {
        let narrow = Loader::matrix(&self.stream, wide.rows, columns, DType::Bf16, "router in bfloat16")?;
        let count = wide.rows * columns;
        let params =
            ElementParams { input: wide.address(), out: narrow.address(), count: count as u64, width: 0, block: 0 };
        let grid = Grid::new(count.div_ceil(256).min(1 << 16), 1, 256);
        self.stream.launch(&self.kernels.convert_bf16, grid, &params)?;
        Ok(narrow)
    }

    pub(crate) fn moe_run(&mut self, layer: &Moe, x: &Tensor, routing: Routing<'_>, out: &Tensor) -> Result<()> {
        let (tokens, shape) = (self.tokens(), layer.shape);
        x.expect("moe input", tokens, shape.hidden, self.precision)?;
        out.expect("moe output", tokens, shape.hidden, self.precision)?;
        self.scratch.reset();
        let forced = self.moe_forced(&shape, routing)?;
        let work = self.moe_work(layer)?;
        self.moe_route(layer, x, forced, &work)?;
        let weights = self.moe_weights(layer)?;
        if self.moe_single(layer).is_some() {
            return self.moe_single_products(layer, &weights, &work, (x.address(), out.address()));
        }
        self.moe_products(layer, x, &weights, &work)?;
        let mut is_apart = layer.shared_choices(tokens) == 0;
        match (&layer.shared, layer.last_expert(&weights, self.precision)) {
            (Some(shared), _) => self.mlp_rows(shared, x.address(), work.shared)?,
            (None, Some(weights)) if is_apart => {
                let shape = MlpShape { hidden: shape.hidden, width: layer.width };
                self.mlp_products(shape, weights, x.address(), work.shared)?;
            }
            (None, _) => is_apart = false,
        }
        let params = MoeCombineParams {
            rows: work.rows,
            shared: if is_apart { work.shared } else { 0 },
            position: work.position,
            weights: work.weights,
            out: out.address(),
            hidden: shape.hidden as u32,
            top_k: layer.choices(tokens) as u32,
        };
        if self.may_defer_sum() && shape.hidden.is_multiple_of(4) && shape.hidden <= MOST_FUSED {
            self.deferred_sum = Some(params);
            return Ok(());
        }
        match self.moe_wide(layer) {
            Some((kernels, _)) => self.moe_wide_combine(kernels, &params, tokens),
            None => self.moe_combine(&params),
        }
    }

    /// Whether the op that follows is known to be the norm that reads the sum: nothing looks in between into a step that is
    /// recorded, and a group of one has nothing to add.
    fn may_defer_sum(&self) -> bool {
        self.recorder.is_recording() && matches!(self.exchange, Exchange::Alone)
    }

    /// Queues a weighted sum of experts.
    pub(crate) fn moe_combine(&self, params: &MoeCombineParams) -> Result<()> {
        let grid = Grid::new(self.tokens(), 1, sum_threads(params)).shared(sum_shared(params));
        self.stream.launch(&self.kernels.moe_combine, grid, params)
    }

    /// Queues a weighted sum of experts and the norm whose delta it is.
    pub(crate) fn moe_combine_norm(&self, combine: MoeCombineParams, norm: NormParams) -> Result<()> {
        let grid = Grid::new(self.tokens(), 1, sum_threads(&combine)).shared(sum_shared(&combine));
        self.stream.launch(&self.kernels.moe_combine_norm, grid, &MoeCombineNormParams { combine, norm })
    }

    /// The tensor-core kernels for this layer and a step of few rows an expert, if there are any.
    fn moe_tensor(&self, layer: &Moe) -> Option<&MoeTensor> {
        if !layer.shape.hidden.is_multiple_of(BLOCK) {
            return None;
        }
        let rows = self.tokens() * layer.shape.top_k / layer.shape.experts;
        let (hidden, width) = (layer.shape.hidden, layer.width);
        let is_deep = hidden.is_multiple_of(SKINNY_DEPTH) && width.is_multiple_of(SKINNY_DEPTH);
        let most = if self.tokens() <= tuning().narrow { SKINNY_COLUMNS / 2 } else { SKINNY_COLUMNS };
        let skinny = self.kernels.moe_skinny.iter().rfind(|kernel| kernel.columns <= most.min(hidden).min(2 * width));
        if rows <= FEW_ROWS && is_deep && skinny.is_some() {
            let many = self.kernels.moe_skinny_many.as_ref().filter(|_| self.tokens() > tuning().turns);
            return skinny.map(|skinny| many.filter(|many| many.columns == skinny.columns).unwrap_or(skinny));
        }
        self.kernels.moe_tensor.as_ref()
    }

    /// In float32 mode experts stay as they are stored, since they would not fit otherwise, and are widened for each product.
    fn stored_type<'a>(&self, mut experts: impl Iterator<Item = &'a MlpWeights<'a>>) -> DType {
        let is_narrow = |slice: &TensorSlice<'_>| slice.dtype == DType::Bf16;
        if experts.all(|expert| [&expert.gate, &expert.up, &expert.down].into_iter().all(is_narrow)) {
            DType::Bf16
        } else {
            self.precision
        }
    }

    fn moe_weights(&self, layer: &Moe) -> Result<ExpertWeights> {
        let [gate_up, down] =
            self.loader.widened(&self.stream, &self.kernels, [&layer.gate_up, &layer.down], self.precision)?;
        Ok(ExpertWeights { gate_up, down })
    }

    fn moe_products(&self, layer: &Moe, x: &Tensor, weights: &ExpertWeights, work: &Work) -> Result<()> {
        let shape = layer.shape;
        let tokens = self.tokens();
        let entries = tokens * layer.choices(tokens);
        let up = MoeProductParams {
            input: x.address(),
            weight: weights.gate_up,
            out: work.inner,
            source: work.source,
            tiles: work.tiles,
            tile_count: work.tile_count,
            depth: shape.hidden as u32,
            width: layer.width as u32,
            top_k: layer.choices(tokens) as u32,
            reserved: 0,
        };
        let down = MoeProductParams {
            input: work.inner,
            weight: weights.down,
            out: work.rows,
            depth: layer.width as u32,
            width: shape.hidden as u32,
            ..up
        };
        let tiles = |rows| entries.div_ceil(rows) + layer.experts(tokens).min(entries);
        if let Some((kernels, weights)) = self.moe_wide(layer) {
            return self.moe_wide_products(layer, kernels, weights, x.address(), work);
        }
        if let Some(tensor) = self.moe_tensor(layer) {
            let most = tiles(tensor.rows);
            let height = if tensor.takes_turns { self.moe_likely_tiles(layer, tensor.rows).min(most) } else { most };
            let grid =
                |weight_rows: usize| Grid::new(weight_rows.div_ceil(tensor.columns), height, 256).shared(tensor.shared);
            self.stream.launch(&tensor.gate_up, grid(2 * layer.width), &up)?;
            return self.stream.launch(&tensor.down, grid(shape.hidden), &down);
        }
        let grid = |columns: usize| Grid::new(columns.div_ceil(TILE_COLUMNS), tiles(TILE_ROWS), 256);
        self.stream.launch(&self.kernels.moe_gate_up, grid(layer.width), &up)?;
        self.stream.launch(&self.kernels.moe_down, grid(shape.hidden), &down)
    }

    /// Tiles that this step's products have blocks for where these take them in turn: a part of those that even routing gives. How many there
    /// are only the device knows.
    fn moe_likely_tiles(&self, layer: &Moe, rows: usize) -> usize {
        let (tokens, shape) = (self.tokens(), layer.shape);
        let untouched = (1.0 - shape.top_k as f64 / shape.experts as f64).powf(tokens as f64);
        let routed = shape.experts as f64 * (1.0 - untouched) * tuning().tiles as f64 / 100.0;
        routed.ceil() as usize + layer.shared_choices(tokens) * tokens.div_ceil(rows)
    }

    /// Forced choices on the device, or 0.
    fn moe_forced(&mut self, shape: &MoeShape, routing: Routing<'_>) -> Result<u64> {
        let Routing::Forced(experts) = routing else { return Ok(0) };
        let expected = self.tokens() * shape.top_k;
        if experts.len() != expected {
            return Err(BackendError::shape("forced experts", &[expected], &[experts.len()]));
        }
        if let Some(&expert) = experts.iter().find(|&&expert| expert as usize >= shape.experts) {
            return Err(BackendError::Range {
                what: "forced expert",
                index: expert.into(),
                limit: shape.experts as u64,
            });
        }
        self.scratch.send(&self.stream, bytemuck::cast_slice(experts))
    }

    fn moe_work(&mut self, layer: &Moe) -> Result<Work> {
        let (tokens, shape, element) = (self.tokens(), layer.shape, self.precision.bytes());
        let entries = tokens * layer.choices(tokens);
        let tiles = entries.div_ceil(LEAST_TILE) + layer.experts(tokens);
        let scratch = &mut self.scratch;
        Ok(Work {
            scores: scratch.take(router_parts(&shape, tokens) * tokens * shape.experts * 4)?,
            chosen: scratch.take(entries * 4)?,
            weights: scratch.take(entries * 4)?,
            // Whole blocks of the sorted copy read it.
            source: scratch.take(entries.next_multiple_of(GATHER_ROWS) * 4)?,
            position: scratch.take(entries * 4)?,
            tiles: scratch.take(tiles * size_of::<MoeTile>())?,
            tile_count: scratch.take(8)?,
            counts: scratch.take(needs::sort_counts(entries, layer.experts(tokens)))?,
            inner: scratch.take(entries * layer.width * element)?,
            rows: scratch.take(entries * shape.hidden * element)?,
            shared: scratch.take(tokens * shape.hidden * element)?,
        })
    }

    /// Scores, selection, weights, and the sort by expert.
    fn moe_route(&mut self, layer: &Moe, x: &Tensor, forced: u64, work: &Work) -> Result<()> {
        let (tokens, shape) = (self.tokens(), layer.shape);
        let entries = tokens * layer.choices(tokens);
        let narrow = layer.narrow_router.as_ref().filter(|_| tokens >= ROUTER_PRODUCT);
        let normed = self.moe_norm_of_router(layer, x.address());
        let is_whole = narrow.is_some() || normed.is_some() || self.moe_routes_few(layer, forced);
        let parts = if is_whole { 1 } else { router_parts(&shape, tokens) };
        let params = MoeRouterParams {
            x: x.address(),
            weight: layer.router.address(),
            scores: work.scores,
            tokens: tokens as u32,
            experts: shape.experts as u32,
            hidden: shape.hidden as u32,
            parts: parts as u32,
        };
        let select = MoeSelectParams {
            scores: work.scores,
            bias: layer.bias.address(),
            forced,
            own: self.moe_selected(tokens * shape.top_k)?,
            live: self.step.live.address,
            chosen: work.chosen,
            weights: work.weights,
            tokens: tokens as u32,
            experts: shape.experts as u32,
            top_k: shape.top_k as u32,
            groups: shape.groups as u32,
            top_groups: shape.top_groups as u32,
            renormalize: u32::from(shape.renormalize),
            scale: shape.scale,
            shared: layer.shared_choices(tokens) as u32,
            parts: parts as u32,
            reserved: 0,
        };
        let sort = MoeSortParams {
            chosen: work.chosen,
            source: work.source,
            position: work.position,
            tiles: work.tiles,
            tile_count: work.tile_count,
            touched: self.touched.address(),
            entries: entries as u32,
            experts: layer.experts(tokens) as u32,
            tile_rows: self.moe_tensor(layer).map_or(TILE_ROWS, |tensor| tensor.rows) as u32,
            routed: shape.experts as u32,
        };
        if self.moe_routes_few(layer, forced) {
            return self.moe_route_few(layer, (params, select, sort));
        }
        self.settle_norm()?;
        if let Some(normed) = normed {
            self.moe_norm_router(normed, (params, select, sort))?;
        } else if let Some(weight) = narrow {
            let product =
                Product { result: DType::Fp32, ..Product::dense(tokens, shape.hidden, shape.experts, DType::Bf16) };
            let operands = Operands { input: x.address(), weight: weight.address(), out: work.scores };
            self.blas.run(&self.stream, &product, operands)?;
        } else {
            let tile = ROUTER_TILE;
            let mut grid = Grid::new(shape.experts.div_ceil(tile), tokens.div_ceil(tile), 256);
            grid.blocks.2 = parts as u32;
            match self.moe_router_tensor(layer, tokens) {
                Some((kernel, weight)) => {
                    let params = MoeRouterParams { weight: weight.address(), ..params };
                    let grid = Grid { threads: 128, ..grid.shared(ROUTER_SHARED) };
                    self.stream.launch(kernel, grid, &params)?;
                }
                None => self.stream.launch(&self.kernels.moe_router_tile, grid, &params)?,
            }
        }
        if let Some((kernels, _)) = self.moe_wide(layer) {
            let grid = Grid::new(tokens.div_ceil(4), 1, 128).shared(4 * select_shared(&shape));
            self.stream.launch(&self.kernels.moe_select, grid, &select)?;
            return self.moe_wide_sort(layer, kernels, work);
        }
        if self.moe_selects_many(layer, forced) {
            return self.moe_select_many((params, select, sort));
        }
        let grid = Grid::new(tokens.div_ceil(4), 1, 128).shared(4 * select_shared(&shape));
        self.stream.launch(&self.kernels.moe_select, grid, &select)?;
        self.stream.launch(&self.kernels.moe_sort, Grid::new(1, 1, 1024).shared(layer.experts(tokens) * 4), &sort)
    }

    /// The router on tensor cores and its weights, where they fit and tokens are many.
    fn moe_router_tensor<'a>(
        &'a self,
        layer: &'a Moe,
        tokens: usize,
    ) -> Option<(&'a Kernel<MoeRouterParams>, &'a Matrix)> {
        let fits = tokens >= tuning().router && layer.shape.hidden.is_multiple_of(ROUTER_DEPTH);
        self.kernels.moe_router_tensor.as_ref().zip(layer.narrow_router.as_ref()).filter(|_| fits)
    }

    /// Room for the layer's own selection; kept until the next layer's. Grows outside of steady state only.
    fn moe_selected(&mut self, entries: usize) -> Result<u64> {
        if self.selected.as_ref().is_none_or(|selected| selected.own.bytes() < entries * 4) {
            let room = entries.max(self.most_rows * entries.div_ceil(self.tokens().max(1))) * 4;
            let own = Buffer::new(self.stream.device(), room, "selected experts")?;
            self.selected = Some(Selected { own, count: 0 });
        }
        match &mut self.selected {
            Some(selected) => {
                selected.count = entries;
                Ok(selected.own.address())
            }
            None => Ok(0),
        }
    }

    /// Device address of the layers' own selections, 0 before the first.
    pub(crate) fn selected_address(&self) -> u64 {
        self.selected.as_ref().map_or(0, |selected| selected.own.address())
    }

    pub(crate) fn moe_read_touched(&self) -> Result<u64> {
        let mut count = [0u8; 8];
        self.stream.read(&self.touched, 0, &mut count)?;
        Ok(u64::from_le_bytes(count))
    }

    pub(crate) fn moe_read_selected(&self) -> Result<Vec<u32>> {
        let Some(selected) = &self.selected else { return Ok(Vec::new()) };
        let mut bytes = vec![0; selected.count * 4];
        self.stream.read(&selected.own, 0, &mut bytes)?;
        Ok(bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
    }
}

/// Shared memory of one warp of the selection.
fn select_shared(shape: &MoeShape) -> usize {
    (2 * shape.experts + shape.groups + 2 * shape.top_k) * 4
}

/// Parts of the depth that the router of a step's tokens is computed in, so that few tokens too occupy the device.
fn router_parts(shape: &MoeShape, tokens: usize) -> usize {
    if tokens < ROUTER_MANY {
        return 1;
    }
    let tiles = tokens.div_ceil(ROUTER_TILE) * shape.experts.div_ceil(ROUTER_TILE);
    (ROUTER_BLOCKS / tiles).min(shape.hidden / ROUTER_PART).max(1)
}

/// Threads of a block that sums a token's experts, four numbers each.
fn sum_threads(params: &MoeCombineParams) -> u32 {
    params.hidden.div_ceil(4).next_multiple_of(32).min(MOST_FUSED as u32 / 4)
}

/// Its shared memory: a sorted row and a weight for each choice.
fn sum_shared(params: &MoeCombineParams) -> usize {
    params.top_k.next_multiple_of(8) as usize * 8
}

fn check(shape: &MoeShape, weights: &MoeWeights<'_>) -> Result<()> {
    let groups_fit = shape.groups > 0
        && shape.experts.is_multiple_of(shape.groups)
        && (1..=shape.groups).contains(&shape.top_groups)
        && (shape.groups == 1 || shape.experts / shape.groups >= 2);
    let kept = shape.experts / shape.groups.max(1) * shape.top_groups;
    if !groups_fit || shape.top_k == 0 || shape.top_k > kept || 4 * select_shared(shape) > PLAIN_SHARED {
        return Err(BackendError::Unsupported(format!(
            "a mixture of {} experts in {} groups with {} groups and {} experts a token",
            shape.experts, shape.groups, shape.top_groups, shape.top_k
        )));
    }
    weights.router.expect(&[shape.experts, shape.hidden])?;
    weights.bias.expect(&[shape.experts])?;
    if weights.experts.len() != shape.experts {
        return Err(BackendError::shape("experts of a layer", &[shape.experts], &[weights.experts.len()]));
    }
    for expert in &weights.experts {
        expert.gate.expect(&[shape.width, shape.hidden])?;
        expert.up.expect(&[shape.width, shape.hidden])?;
        expert.down.expect(&[shape.hidden, shape.width])?;
    }
    if weights.shared.is_some() != (shape.shared_width > 0) {
        return Err(BackendError::shape("shared experts (width)", &[shape.shared_width], &[0]));
    }
    Ok(())
}
