//! Dense products: with few tokens by a kernel that reads the weights ahead of the kernel before it, else through cuBLASLt.

use perigee_backend::{DType, Result};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::kernels::Skinny;
use crate::params::SkinnyParams;
use crate::stream::Grid;

/// Depth of a step of the kernels for few tokens.
const DEPTH: usize = 64;
/// Blocks below which the weight rows are shared out more finely, with more warps on each.
const FEW_BLOCKS: usize = 100;

impl CudaBackend {
    /// Queues a product.
    pub(crate) fn dense(&mut self, product: &Product, operands: Operands) -> Result<()> {
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
            reserved: 0,
        };
        let kernel = match product.result {
            DType::Bf16 => &form.to_bf16,
            DType::Fp32 => &form.to_fp32,
        };
        let grid = Grid::new(product.out.div_ceil(form.rows), 1, 256).shared(form.shared);
        self.stream.launch(kernel, grid, &params)
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
