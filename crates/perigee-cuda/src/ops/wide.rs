//! The grouped products of a mixture of experts in steps that give each expert many rows, and the sort that makes their tiles.

use perigee_backend::{DType, Result};

use crate::backend::CudaBackend;
use crate::kernels::{MoeWide, WideProduct};
use crate::needs::SORT_ENTRIES;
use crate::ops::moe::{Moe, Work};
use crate::params::{MoeCombineParams, MoeGatherParams, MoeSpreadParams, MoeWideParams};
use crate::stream::Grid;
use crate::tensor::Matrix;
use crate::tensor_map::{Rows, TensorMap};

/// Rows an expert from which these kernels are faster than the others.
const LEAST_ROWS: usize = 16;
/// Rows an expert up to which tiles are small: few rows of some experts then need a second tile.
const MOST_SMALL: usize = 40;
/// Weight rows of a tile, and sorted rows of a copy.
const WEIGHT_ROWS: u32 = 128;
const BOX_ROWS: u32 = 32;
/// Rows of a block of the sorted copy.
pub(crate) const GATHER_ROWS: usize = 16;
/// Numbers that the kernels read and write at a time.
const VECTOR: usize = 8;

/// The experts' weights as the copy engine sees them.
#[derive(Debug)]
pub(crate) struct WideWeights {
    gate_up: TensorMap,
    down: TensorMap,
}

impl CudaBackend {
    /// The weights, each with its depth, for kernels that fit them: none for other shapes.
    pub(crate) fn moe_wide_weights(
        &self,
        (gate_up, hidden): (&Matrix, usize),
        (down, width): (&Matrix, usize),
    ) -> Result<Option<WideWeights>> {
        if self.precision != DType::Bf16 || !hidden.is_multiple_of(VECTOR) || !width.is_multiple_of(VECTOR) {
            return Ok(None);
        }
        let map = |matrix: &Matrix, columns| {
            let (address, rows, pitch) = (matrix.address(), matrix.rows, matrix.pitch);
            TensorMap::new(Rows { address, columns, rows, pitch, box_rows: WEIGHT_ROWS })
        };
        Ok(Some(WideWeights { gate_up: map(gate_up, hidden)?, down: map(down, width)? }))
    }

    /// The kernels and a layer's weights for them, where this step gives experts many rows.
    pub(crate) fn moe_wide<'a>(&'a self, layer: &'a Moe) -> Option<(&'a MoeWide, &'a WideWeights)> {
        let is_wide = self.tokens() * layer.shape.top_k >= LEAST_ROWS * layer.shape.experts;
        self.kernels.moe_wide.as_ref().zip(layer.wide.as_ref()).filter(|_| is_wide)
    }

    /// The products whose tiles suit this step.
    fn moe_wide_product<'a>(&self, layer: &Moe, kernels: &'a MoeWide) -> &'a WideProduct {
        let [small, large] = &kernels.products;
        if self.tokens() * layer.shape.top_k <= MOST_SMALL * layer.shape.experts { small } else { large }
    }

    pub(crate) fn moe_wide_sort(&self, layer: &Moe, kernels: &MoeWide, work: &Work) -> Result<()> {
        let tokens = self.tokens();
        let (entries, experts) = (tokens * layer.choices(tokens), layer.experts(tokens));
        let params = MoeSpreadParams {
            chosen: work.chosen,
            source: work.source,
            position: work.position,
            tiles: work.tiles,
            tile_count: work.tile_count,
            touched: self.touched.address(),
            counts: work.counts,
            entries: entries as u32,
            experts: experts as u32,
            tile_rows: self.moe_wide_product(layer, kernels).rows as u32,
            routed: layer.shape.experts as u32,
            block_entries: SORT_ENTRIES as u32,
            reserved: 0,
        };
        let grid = Grid::new(entries.div_ceil(SORT_ENTRIES), 1, 1024);
        self.stream.launch(&kernels.count, grid.shared(experts * 4), &params)?;
        self.stream.launch(&kernels.spread, grid.shared(experts * 8), &params)
    }

    pub(crate) fn moe_wide_combine(&self, kernels: &MoeWide, params: &MoeCombineParams, tokens: usize) -> Result<()> {
        let threads = (params.hidden as usize).div_ceil(VECTOR).next_multiple_of(32).min(1024) as u32;
        self.stream.launch(&kernels.combine, Grid::new(tokens, 1, threads), params)
    }

    pub(crate) fn moe_wide_products(
        &self,
        layer: &Moe,
        kernels: &MoeWide,
        weights: &WideWeights,
        x: u64,
        work: &Work,
    ) -> Result<()> {
        let tokens = self.tokens();
        let (entries, shape) = (tokens * layer.choices(tokens), layer.shape);
        // The place of the second product's result is free until then.
        let gathered = work.rows;
        let params = MoeGatherParams {
            x,
            out: gathered,
            source: work.source,
            rows: work.tile_count + 4,
            pieces: (shape.hidden / VECTOR) as u32,
            top_k: layer.choices(tokens) as u32,
        };
        self.stream.launch(&kernels.gather, Grid::new(entries.div_ceil(GATHER_ROWS), 1, 256), &params)?;
        let sorted = |address, columns| {
            TensorMap::new(Rows { address, columns, rows: entries, pitch: columns, box_rows: BOX_ROWS })
        };
        let up = MoeWideParams {
            weight: weights.gate_up,
            rows: sorted(gathered, shape.hidden)?,
            out: work.inner,
            tiles: work.tiles,
            tile_count: work.tile_count,
            depth: shape.hidden as u32,
            width: layer.width as u32,
            reserved: [0; 8],
        };
        let down = MoeWideParams {
            weight: weights.down,
            rows: sorted(work.inner, layer.width)?,
            out: work.rows,
            depth: layer.width as u32,
            width: shape.hidden as u32,
            ..up
        };
        // Pairs of blocks work through tiles until none is left.
        let blocks = self.stream.device().multiprocessors() as usize / 2 * 2;
        let product = self.moe_wide_product(layer, kernels);
        let grid = Grid::new(blocks, 1, 384).shared(product.shared);
        self.stream.launch(&product.gate_up, grid, &up)?;
        self.stream.launch(&product.down, grid, &down)
    }
}
