//! The mixture of experts for few tokens, where the way from one product to the next is most of the time: norm, router, selection and
//! sort in one kernel; and for one token its experts' products without a list of tiles, the weighted sum in the second.

use bytemuck::Zeroable;
use perigee_backend::{DType, Result};

use crate::backend::CudaBackend;
use crate::formula::Fault;
use crate::kernels::{MoeSingle, NORM_ROUTER_SHARED};
use crate::needs::MOVED_ROWS;
use crate::ops::dense::{ring_bytes, single_stages};
use crate::ops::moe::{ExpertWeights, Moe, Work};
use crate::params::{MoeRouteParams, MoeRouterParams, MoeSelectParams, MoeSingleParams, MoeSortParams, NormParams};
use crate::stream::Grid;
use crate::tuning::tuning;

/// Most tokens that are routed by one kernel, and most experts that they choose from.
const ROUTE_TOKENS: usize = 16;
const ROUTE_EXPERTS: usize = 256;
/// Most routed experts of a token.
const ROUTE_TOP: usize = 8;
/// Most experts of a token, and most entries (moe_route.cu).
const ROUTE_CHOICES: usize = 32;
const ROUTE_ENTRIES: usize = 512;
/// Most entries of the selection with the sort (moe_select_many.cu).
const SELECT_ENTRIES: usize = 2560;
/// Tokens and experts of a block.
const BLOCK_TOKENS: usize = 4;
const BLOCK_EXPERTS: usize = 4;
/// Most tokens that are normed on the way, by every block that scores them; and the widest.
const NORM_TOKENS: usize = 1;
const MOST_NORMED: usize = 2560;
/// Tokens, experts and blocks of a cluster that norms more of them on the way to the router, and the widest token (moe_norm_router.cu).
const CLUSTER_TOKENS: usize = 32;
const CLUSTER_EXPERTS: usize = 64;
const CLUSTER_BLOCKS: usize = 6;
const CLUSTER_WIDTH: usize = 384 * CLUSTER_BLOCKS;
/// The width is a multiple of this.
const CLUSTER_STEP: usize = 64;
/// Bytes of the counts of blocks that the routing keeps, behind the count of experts.
pub(crate) const ROUTE_COUNTS: usize = 4 * (1 + ROUTE_TOKENS / BLOCK_TOKENS);

impl CudaBackend {
    /// Whether one kernel routes the step's tokens.
    pub(crate) fn moe_routes_few(&self, layer: &Moe, forced: u64) -> bool {
        let tokens = self.tokens();
        tokens <= ROUTE_TOKENS
            && tokens * layer.choices(tokens) <= ROUTE_ENTRIES
            && self.moe_selects_by_blocks(layer, forced)
    }

    /// Whether one kernel selects the step's tokens' experts, a block a token, and sorts them.
    pub(crate) fn moe_selects_many(&self, layer: &Moe, forced: u64) -> bool {
        let tokens = self.tokens();
        tokens >= tuning().select
            && tokens * layer.choices(tokens) <= SELECT_ENTRIES
            && self.moe_selects_by_blocks(layer, forced)
    }

    /// Whether a block can select a token's experts.
    fn moe_selects_by_blocks(&self, layer: &Moe, forced: u64) -> bool {
        let shape = &layer.shape;
        shape.groups == 1
            && shape.experts <= ROUTE_EXPERTS
            && shape.top_k <= ROUTE_TOP
            && layer.choices(self.tokens()) <= ROUTE_CHOICES
            && forced == 0
            && !self.formula.has(Fault::BiasedWeights)
    }

    /// Queues that kernel, behind the router's.
    pub(crate) fn moe_select_many(
        &self,
        (router, select, sort): (MoeRouterParams, MoeSelectParams, MoeSortParams),
    ) -> Result<()> {
        let arrived = self.touched.address() + 8;
        let params = MoeRouteParams { router, select, sort, norm: NormParams::zeroed(), arrived };
        self.stream.launch(&self.kernels.moe_select_many, Grid::new(router.tokens as usize, 1, 256), &params)
    }

    /// Queues that kernel, with the norm that was put off, if that is what makes its x.
    pub(crate) fn moe_route_few(
        &mut self,
        layer: &Moe,
        (router, select, mut sort): (MoeRouterParams, MoeSelectParams, MoeSortParams),
    ) -> Result<()> {
        if self.moe_single(layer).is_some() {
            sort.entries = 0;
        }
        let (tokens, experts) = (router.tokens as usize, router.experts as usize);
        let grid = Grid::new(experts.div_ceil(BLOCK_EXPERTS), tokens.div_ceil(BLOCK_TOKENS), 256);
        let norm = self.deferred_norm.filter(|norm| norm.out == router.x && norm.width == router.hidden);
        let arrived = self.touched.address() + 8;
        if let (Some(kernel), Some(norm)) = (&self.kernels.moe_norm_route, norm) {
            let params = MoeRouteParams { router, select, sort, norm, arrived };
            self.stream.launch(kernel, grid, &params)?;
            self.deferred_norm = None;
            return Ok(());
        }
        self.settle_norm()?;
        let params = MoeRouteParams { router, select, sort, norm: NormParams::zeroed(), arrived };
        self.stream.launch(&self.kernels.moe_route, grid, &params)
    }

    /// Puts a norm of the residual stream off until the op that reads it is known, where that op may compute it.
    pub(crate) fn may_defer_norm(&self, norm: &NormParams) -> bool {
        let has_kernel = self.kernels.moe_norm_route.is_some();
        let is_whole = norm.width.is_multiple_of(4) && norm.width as usize <= MOST_NORMED && norm.delta != 0;
        let is_normed = self.tokens() <= NORM_TOKENS || self.norms_by_clusters();
        self.recorder.is_recording() && is_normed && is_whole && has_kernel
    }

    /// Whether the step's tokens are as many as are normed by clusters of the router's blocks.
    fn norms_by_clusters(&self) -> bool {
        (ROUTE_TOKENS + 1..=tuning().normed.min(MOVED_ROWS)).contains(&self.tokens())
    }

    /// Takes the norm that was put off, if it is what makes the router's x and the router by clusters computes it; and its weights.
    pub(crate) fn moe_norm_of_router(&mut self, layer: &Moe, x: u64) -> Option<(NormParams, u64)> {
        let shape = &layer.shape;
        let fits = self.norms_by_clusters()
            && shape.hidden <= CLUSTER_WIDTH
            && shape.hidden.is_multiple_of(CLUSTER_STEP)
            && shape.experts.is_multiple_of(4)
            && self.kernels.moe_norm_router.is_some();
        let weight = layer.narrow_router.as_ref().filter(|_| fits)?.address();
        Some((self.take_norm(x, shape.hidden)?, weight))
    }

    /// Queues that router with the norm.
    pub(crate) fn moe_norm_router(
        &self,
        (norm, weight): (NormParams, u64),
        (router, select, sort): (MoeRouterParams, MoeSelectParams, MoeSortParams),
    ) -> Result<()> {
        let Some(kernel) = &self.kernels.moe_norm_router else { return Ok(()) };
        let router = MoeRouterParams { weight, ..router };
        let experts = (router.experts as usize).div_ceil(CLUSTER_EXPERTS);
        let mut grid =
            Grid::new(experts, (router.tokens as usize).div_ceil(CLUSTER_TOKENS), 256).shared(NORM_ROUTER_SHARED);
        grid.blocks.2 = CLUSTER_BLOCKS as u32;
        self.stream.launch(kernel, grid, &MoeRouteParams { router, select, sort, norm, arrived: 0 })
    }

    /// The kernels for one token's experts, where they fit.
    pub(crate) fn moe_single(&self, layer: &Moe) -> Option<&MoeSingle> {
        let (hidden, width) = (layer.shape.hidden, layer.width);
        let choices = layer.choices(1);
        let group = down_group(hidden);
        let blocks = self.stream.device().multiprocessors().max(1) as usize;
        let dots = (hidden / group).div_ceil(blocks) * group * choices;
        let fits = self.tokens() == 1
            && self.precision == DType::Bf16
            && !layer.has_shared_apart()
            && hidden.is_multiple_of(8)
            && hidden <= MoeSingle::MOST.0
            && width <= MoeSingle::MOST.1
            && choices <= MoeSingle::MOST_CHOICES
            && dots <= MoeSingle::MOST_DOTS;
        self.kernels.moe_single.as_ref().filter(|_| fits)
    }

    /// The experts' products of one token and their weighted sum, between two device addresses.
    pub(crate) fn moe_single_products(
        &self,
        layer: &Moe,
        weights: &ExpertWeights,
        work: &Work,
        (x, out): (u64, u64),
    ) -> Result<()> {
        let Some(kernels) = self.moe_single(layer) else { return Ok(()) };
        let (shape, choices) = (layer.shape, layer.choices(1));
        let up = MoeSingleParams {
            input: x,
            weight: weights.gate_up,
            out: work.inner,
            chosen: work.chosen,
            weights: work.weights,
            depth: shape.hidden as u32,
            width: layer.width as u32,
            choices: choices as u32,
            shared: (choices - shape.top_k) as u32,
            experts: shape.experts as u32,
            stages: single_stages(shape.hidden, 0) as u32,
        };
        let inner = choices * layer.width * 2;
        let group = down_group(shape.hidden);
        let (kernel, stages) = match group {
            1 => (&kernels.down, single_stages(layer.width, inner)),
            _ => (&kernels.down_grouped, MoeSingle::GROUP_STAGES),
        };
        let down = MoeSingleParams {
            input: work.inner,
            weight: weights.down,
            out,
            depth: layer.width as u32,
            width: shape.hidden as u32,
            stages: stages as u32,
            ..up
        };
        let rings = |params: &MoeSingleParams| ring_bytes(params.stages as usize, params.depth as usize);
        self.stream.launch(&kernels.gate_up, self.single_grid().shared(rings(&up)), &up)?;
        self.stream.launch(kernel, self.single_grid().shared(group * rings(&down) + inner), &down)
    }
}

/// Neighbouring channels of one token's product down that are one piece for the copy engine.
fn down_group(hidden: usize) -> usize {
    if hidden.is_multiple_of(MoeSingle::GROUP) { MoeSingle::GROUP } else { 1 }
}
