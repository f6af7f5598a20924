//! Dense products: with few tokens by a kernel that reads the weights ahead of the kernel before it, else through cuBLASLt.

use perigee_backend::{DType, Result};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::kernels::{NORMED_DEPTH, RING_STAGES, RING_WARPS, Single, Skinny};
use crate::params::{NormedProductParams, SkinnyParams};
use crate::stream::Grid;

/// Depth of a step of the kernels for few tokens.
const DEPTH: usize = 64;
/// Blocks below which the weight rows are shared out more finely, with more warps on each.
const FEW_BLOCKS: usize = 100;

impl CudaBackend {
    /// Queues a product.
    pub(crate) fn dense(&mut self, product: &Product, operands: Operands) -> Result<()> {
        if let Some(form) = self.single(product) {
            return self.dense_single(form, product, operands);
        }
        let Some(form) = self.skinny(product) else { return self.blas.run(&self.stream, product, operands) };
        let params = SkinnyParams {
            input: operands.input,
            weight: operands.weight,
            out: operands.out,
            tokens: product.rows as u32,
            rows: product.out as u32,
            depth: product.depth as u32,
            in_pitch: product.input_pitch as u32,
            out_pitch: product.out_pitch as u32,
            stages: 0,
        };
        let kernel = match product.result {
            DType::Bf16 => &form.to_bf16,
            DType::Fp32 => &form.to_fp32,
        };
        let grid = Grid::new(product.out.div_ceil(form.rows), 1, 256).shared(form.shared);
        self.stream.launch(kernel, grid, &params)
    }

    /// Queues a product that may be the first to read a norm of the residual stream.
    pub(crate) fn dense_after_norm(&mut self, product: &Product, operands: Operands) -> Result<()> {
        let may_norm = product.depth <= NORMED_DEPTH
            && product.result == DType::Bf16
            && self.kernels.single_normed.is_some()
            && self.single(product).is_some();
        let norm = if may_norm { self.take_norm(operands.input, product.depth) } else { None };
        let (Some(norm), Some(kernel)) = (norm, &self.kernels.single_normed) else {
            self.settle_norm()?;
            return self.dense(product, operands);
        };
        let params = single_params(product, operands);
        let grid = self.single_grid().shared(ring_bytes(params.stages as usize, product.depth));
        self.stream.launch(kernel, grid, &NormedProductParams { product: params, norm })
    }

    /// Queues a product of one token.
    fn dense_single(&self, form: &Single, product: &Product, operands: Operands) -> Result<()> {
        let params = single_params(product, operands);
        let grid = self.single_grid().shared(ring_bytes(params.stages as usize, product.depth));
        self.stream.launch(&form.kernel, grid, &params)
    }

    /// A block for every multiprocessor.
    pub(crate) fn single_grid(&self) -> Grid {
        Grid::new(self.stream.device().multiprocessors() as usize, 1, 32 * RING_WARPS as u32)
    }

    /// The kernel for a product of one token: the one for the shortest tokens that do.
    fn single(&self, product: &Product) -> Option<&Single> {
        let fits = product.rows == 1
            && product.batch == 1
            && product.transposed
            && product.operand == DType::Bf16
            && product.depth.is_multiple_of(8)
            && product.weight_pitch == product.depth;
        self.kernels
            .single
            .iter()
            .find(|form| form.result == product.result && form.depth >= product.depth)
            .filter(|_| fits)
    }

    /// The kernel for this product, if there is one: the fewest tokens that do, and enough blocks for the device.
    fn skinny(&self, product: &Product) -> Option<&Skinny> {
        let fits = product.rows > 0
            && product.batch == 1
            && product.transposed
            && product.operand == DType::Bf16
            && product.depth.is_multiple_of(DEPTH)
            && product.weight_pitch == product.depth
            && product.input_pitch.is_multiple_of(8)
            && product.out.is_multiple_of(16);
        let forms = || self.kernels.skinny.iter().filter(|form| form.rows <= product.out);
        let tokens = forms().map(|form| form.tokens).find(|&tokens| tokens >= product.rows).filter(|_| fits)?;
        let mut forms = forms().filter(|form| form.tokens == tokens);
        let fine = forms.next()?;
        Some(forms.find(|form| product.out.div_ceil(form.rows) >= FEW_BLOCKS).unwrap_or(fine))
    }
}

fn single_params(product: &Product, operands: Operands) -> SkinnyParams {
    SkinnyParams {
        input: operands.input,
        weight: operands.weight,
        out: operands.out,
        tokens: 1,
        rows: product.out as u32,
        depth: product.depth as u32,
        in_pitch: product.input_pitch as u32,
        out_pitch: product.out_pitch as u32,
        stages: single_stages(product.depth, 0) as u32,
    }
}

/// Shared memory that rings of rows may take: two blocks, of this product and the next, have a multiprocessor together.
pub(crate) const RING_BYTES: usize = 112 << 10;

/// Rows of a warp's ring for products of one token of this depth, beside other shared memory.
pub(crate) fn single_stages(depth: usize, besides: usize) -> usize {
    (RING_BYTES.saturating_sub(besides) / ring_bytes(1, depth).max(1)).clamp(RING_STAGES.0, RING_STAGES.1)
}

/// Bytes of a block's rings, of bfloat16.
pub(crate) fn ring_bytes(stages: usize, depth: usize) -> usize {
    RING_WARPS * stages * depth * 2
}
