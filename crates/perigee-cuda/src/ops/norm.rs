//! RMS norms, alone or after adding to the residual stream.

use perigee_backend::{Result, TensorSlice};

use crate::backend::CudaBackend;
use crate::buffer::Buffer;
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

    pub(crate) fn norm_rows(&self, norm: &Norm, rows: &NormRows) -> Result<()> {
        let params = NormParams {
            residual: rows.residual,
            delta: rows.delta,
            weight: norm.weight.address(),
            out: rows.out,
            width: norm.width as u32,
            residual_pitch: rows.residual_pitch as u32,
            out_pitch: rows.out_pitch as u32,
            eps: norm.eps,
        };
        let threads = norm.width.div_ceil(4).next_multiple_of(32).clamp(32, 512) as u32;
        self.stream.launch(&self.kernels.rms_norm, Grid::new(rows.rows, 1, threads), &params)
    }

    pub(crate) fn norm_run(&self, x: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        x.expect("rms_norm input", self.tokens(), norm.width, self.precision)?;
        out.expect("rms_norm output", self.tokens(), norm.width, self.precision)?;
        self.norm_rows(norm, &self.rows_of(x.address(), 0, out.address(), norm.width))
    }

    pub(crate) fn norm_add_run(&self, residual: &Tensor, delta: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        for (what, tensor) in [("residual", residual), ("delta", delta), ("add_rms_norm output", out)] {
            tensor.expect(what, self.tokens(), norm.width, self.precision)?;
        }
        self.norm_rows(norm, &self.rows_of(residual.address(), delta.address(), out.address(), norm.width))
    }

    fn rows_of(&self, residual: u64, delta: u64, out: u64, width: usize) -> NormRows {
        NormRows { rows: self.tokens(), residual, residual_pitch: width, delta, out, out_pitch: width }
    }
}
