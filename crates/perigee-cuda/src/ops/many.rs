//! Dense products of a decode step of some dozen tokens: clusters of blocks share the depth and read weights ahead of the kernel
//! before them.

use perigee_backend::{DType, Result};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::kernels::MANY_SHARED;
use crate::params::DenseManyParams;
use crate::stream::Grid;
use crate::tensor_map::{Rows, TensorMap};

/// Tokens that the kernel is for: with more, reading them for every 64 weight rows takes longer than cuBLASLt does.
const TOKENS: std::ops::RangeInclusive<usize> = 33..=64;
/// Weight rows and threads of a block.
const ROWS: usize = 64;
const THREADS: u32 = 160;
/// Depth of a step, and the fewest steps of a block.
const DEPTH: usize = 64;
const LEAST_STEPS: usize = 4;
/// Most blocks of a cluster.
const MOST_PARTS: usize = 8;
/// Blocks that a multiprocessor holds.
const RESIDENT: usize = 2;
/// Rows of a copy, of weights or tokens.
const BOX_ROWS: u32 = 64;
/// Numbers that the kernels write at a time.
const VECTOR: usize = 8;
/// What the copy engine asks of addresses, and the kernel of where it writes.
const ALIGNMENT: u64 = 16;

impl CudaBackend {
    /// Queues a product of too many tokens for the kernels that take few.
    pub(crate) fn dense_many(&mut self, product: &Product, operands: Operands) -> Result<()> {
        let kernel = self.kernels.many.as_ref().filter(|_| fits(product, operands));
        let Some(kernel) = kernel else { return self.blas.run(&self.stream, product, operands) };
        let tiles = product.out.div_ceil(ROWS);
        let parts = self.parts_of(product, tiles);
        let map = |address, rows, pitch| {
            TensorMap::new(Rows { address, columns: product.depth, rows, pitch, box_rows: BOX_ROWS })
        };
        let params = DenseManyParams {
            weight: map(operands.weight, product.out, product.weight_pitch)?,
            input: map(operands.input, product.rows, product.input_pitch)?,
            out: operands.out,
            out_pitch: product.out_pitch as u32,
            tokens: product.rows as u32,
            rows: product.out as u32,
            depth: product.depth as u32,
            parts: parts as u32,
            reserved: [0; 9],
        };
        let grid = Grid::new(tiles * parts, 1, THREADS).shared(MANY_SHARED).clusters(parts);
        self.stream.launch(kernel, grid, &params)
    }

    /// Parts of the depth, one a block: as many as leave each some steps while all blocks are at work at once.
    fn parts_of(&self, product: &Product, tiles: usize) -> usize {
        let steps = product.depth / DEPTH;
        let most = RESIDENT * self.stream.device().multiprocessors() as usize;
        let fits = |parts: usize| {
            let share = steps.div_ceil(parts);
            tiles * parts <= most && share >= LEAST_STEPS && (parts - 1) * share < steps
        };
        std::iter::successors(Some(MOST_PARTS), |parts| Some(parts / 2))
            .find(|&parts| parts <= 1 || fits(parts))
            .unwrap_or(1)
    }
}

/// Whether the kernel takes a product.
fn fits(product: &Product, operands: Operands) -> bool {
    let addresses = [operands.input, operands.weight, operands.out];
    let counts = [product.out, product.weight_pitch, product.input_pitch, product.out_pitch];
    TOKENS.contains(&product.rows)
        && product.batch == 1
        && product.transposed
        && (product.operand, product.result) == (DType::Bf16, DType::Bf16)
        && product.depth.is_multiple_of(DEPTH)
        && product.depth >= LEAST_STEPS * DEPTH
        && counts.iter().all(|count| count.is_multiple_of(VECTOR))
        && addresses.iter().all(|address| address.is_multiple_of(ALIGNMENT))
}
