//! RMS norms, alone or after adding to the residual stream.

use perigee_backend::{DType, Result, TensorSlice};

use crate::backend::CudaBackend;
use crate::buffer::Buffer;
use crate::module::Kernel;
use crate::params::NormParams;
use crate::stream::Grid;
use crate::tensor::Tensor;

/// Weight of an RMS norm, in float32.
#[derive(Debug)]
pub struct Norm {
    pub(crate) weight: Buffer,
    pub(crate) width: usize,
    pub(crate) eps: f32,
}

/// Matrices of a norm, by address: `delta` is 0 for none. Pitches count elements.
pub(crate) struct NormRows {
    pub(crate) rows: usize,
    pub(crate) residual: u64,
    pub(crate) residual_pitch: usize,
    pub(crate) delta: u64,
    pub(crate) out: u64,
    pub(crate) out_pitch: usize,
}

impl CudaBackend {
    pub(crate) fn norm_load(&mut self, weight: &TensorSlice<'_>, eps: f32) -> Result<Norm> {
        let width = weight.elements();
        Ok(Norm { weight: self.loader.vector(&self.stream, &self.kernels, weight)?, width, eps })
    }

    /// A norm of activations.
    pub(crate) fn norm_rows(&self, norm: &Norm, rows: &NormRows) -> Result<()> {
        self.norm_launch(&self.kernels.rms_norm, norm, rows)
    }

    fn norm_launch(&self, kernel: &Kernel<NormParams>, norm: &Norm, rows: &NormRows) -> Result<()> {
        let threads = norm.width.div_ceil(4).next_multiple_of(32).clamp(32, 1024) as u32;
        self.stream.launch(kernel, Grid::new(rows.rows, 1, threads), &params(norm, rows))
    }

    /// A norm of the residual stream.
    pub(crate) fn norm_run(&self, stream: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        stream.expect("residual", self.tokens(), norm.width, DType::Fp32)?;
        out.expect("rms_norm output", self.tokens(), norm.width, self.precision)?;
        let rows = self.rows_of(stream.address(), 0, out.address(), norm.width);
        self.norm_launch(&self.kernels.rms_norm_stream, norm, &rows)
    }

    pub(crate) fn norm_add_run(&mut self, stream: &Tensor, delta: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        stream.expect("residual", self.tokens(), norm.width, DType::Fp32)?;
        for (what, tensor) in [("delta", delta), ("add_rms_norm output", out)] {
            tensor.expect(what, self.tokens(), norm.width, self.precision)?;
        }
        let rows = self.rows_of(stream.address(), delta.address(), out.address(), norm.width);
        match self.deferred_sum.take() {
            Some(sum) if sum.out == delta.address() && sum.hidden as usize == norm.width => {
                self.moe_combine_norm(sum, params(norm, &rows))
            }
            other => {
                if let Some(sum) = other {
                    self.moe_combine(&sum)?;
                }
                self.norm_launch(&self.kernels.rms_norm_stream, norm, &rows)
            }
        }
    }

    fn rows_of(&self, residual: u64, delta: u64, out: u64, width: usize) -> NormRows {
        NormRows { rows: self.tokens(), residual, residual_pitch: width, delta, out, out_pitch: width }
    }
}

fn params(norm: &Norm, rows: &NormRows) -> NormParams {
    NormParams {
        residual: rows.residual,
        delta: rows.delta,
        weight: norm.weight.address(),
        out: rows.out,
        width: norm.width as u32,
        residual_pitch: rows.residual_pitch as u32,
        out_pitch: rows.out_pitch as u32,
        eps: norm.eps,
    }
}
