//! RMS norms, alone or after adding to the residual stream.

use perigee_backend::{DType, Result, TensorSlice};

use crate::backend::CudaBackend;
use crate::buffer::Buffer;
use crate::module::Kernel;
use crate::needs::MOVED_ROWS;
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
    /// Where the residual goes with its delta.
    pub(crate) sum: u64,
    pub(crate) out: u64,
    pub(crate) out_pitch: usize,
}

impl CudaBackend {
    pub(crate) fn norm_load(&mut self, weight: &TensorSlice<'_>, eps: f32) -> Result<Norm> {
        let width = weight.elements();
        let bytes = MOVED_ROWS * width * 4;
        if self.stream_copy.as_ref().is_none_or(|copy| copy.bytes() < bytes) {
            self.stream_copy = Some(Buffer::new(self.stream.device(), bytes, "rows of the residual stream")?);
        }
        Ok(Norm { weight: self.loader.vector(&self.stream, &self.kernels, weight)?, width, eps })
    }

    /// A norm of activations.
    pub(crate) fn norm_rows(&self, norm: &Norm, rows: &NormRows) -> Result<()> {
        self.norm_launch(&self.kernels.rms_norm, norm, rows)
    }

    fn norm_launch(&self, kernel: &Kernel<NormParams>, norm: &Norm, rows: &NormRows) -> Result<()> {
        self.norm_queue(kernel, &params(norm, rows), rows.rows)
    }

    fn norm_queue(&self, kernel: &Kernel<NormParams>, params: &NormParams, rows: usize) -> Result<()> {
        let threads = params.width.div_ceil(4).next_multiple_of(32).clamp(32, 1024);
        self.stream.launch(kernel, Grid::new(rows, 1, threads), params)
    }

    /// Queues the norm that was put off, if there is one: by every op that may follow one and does not compute it itself.
    pub(crate) fn settle_norm(&mut self) -> Result<()> {
        let Some(norm) = self.deferred_norm.take() else { return Ok(()) };
        self.norm_queue(&self.kernels.rms_norm_stream, &norm, self.tokens())
    }

    /// A norm of the residual stream.
    pub(crate) fn norm_run(&mut self, stream: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        stream.expect("residual", self.tokens(), norm.width, DType::Fp32)?;
        out.expect("rms_norm output", self.tokens(), norm.width, self.precision)?;
        self.settle_norm()?;
        let rows = self.rows_of(self.stream_place(stream.address()), 0, out.address(), norm.width);
        self.norm_launch(&self.kernels.rms_norm_stream, norm, &rows)
    }

    pub(crate) fn norm_add_run(&mut self, stream: &Tensor, delta: &Tensor, norm: &Norm, out: &Tensor) -> Result<()> {
        stream.expect("residual", self.tokens(), norm.width, DType::Fp32)?;
        for (what, tensor) in [("delta", delta), ("add_rms_norm output", out)] {
            tensor.expect(what, self.tokens(), norm.width, self.precision)?;
        }
        self.settle_norm()?;
        // The sum goes where the stream lies for whoever else reads it, wherever it comes from.
        let place = self.stream_place(stream.address());
        let rows =
            NormRows { sum: stream.address(), ..self.rows_of(place, delta.address(), out.address(), norm.width) };
        self.moved_stream = None;
        match self.deferred_sum.take() {
            Some(sum) if sum.out == delta.address() && sum.hidden as usize == norm.width => {
                self.moe_combine_norm(sum, params(norm, &rows))
            }
            other => {
                if let Some(sum) = other {
                    self.moe_combine(&sum)?;
                }
                let params = params(norm, &rows);
                if self.may_defer_norm(&params) {
                    self.deferred_norm = Some(params);
                    return Ok(());
                }
                self.norm_launch(&self.kernels.rms_norm_stream, norm, &rows)
            }
        }
    }

    /// Where the residual stream at an address lies at this moment of a recording.
    fn stream_place(&self, address: u64) -> u64 {
        self.moved_stream.filter(|&(from, _)| from == address).map_or(address, |(_, to)| to)
    }

    /// Takes the norm that was put off for a product that reads its result and may compute it, and moves the stream's sum: blocks of
    /// that product may still have to read the old one.
    pub(crate) fn take_norm(&mut self, x: u64, width: usize) -> Option<NormParams> {
        if !self.recorder.records_whole() {
            return None;
        }
        let bytes = self.tokens() * width * 4;
        let to = self.stream_copy.as_ref().filter(|copy| copy.bytes() >= bytes)?.address();
        let norm =
            self.deferred_norm.filter(|norm| norm.out == x && norm.width as usize == width && norm.residual != to)?;
        self.deferred_norm = None;
        self.moved_stream = Some((norm.sum, to));
        Some(NormParams { sum: to, ..norm })
    }

    fn rows_of(&self, residual: u64, delta: u64, out: u64, width: usize) -> NormRows {
        NormRows { rows: self.tokens(), residual, residual_pitch: width, delta, sum: residual, out, out_pitch: width }
    }
}

fn params(norm: &Norm, rows: &NormRows) -> NormParams {
    NormParams {
        residual: rows.residual,
        delta: rows.delta,
        weight: norm.weight.address(),
        out: rows.out,
        sum: rows.sum,
        width: norm.width as u32,
        residual_pitch: rows.residual_pitch as u32,
        out_pitch: rows.out_pitch as u32,
        eps: norm.eps,
    }
}
