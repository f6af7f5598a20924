//! Exchange among the ranks of the group: sums of activations and the gather of logits, on the device or through host memory
//! as `exchange.rs` chose. A group of one moves nothing.

use std::ops::Range;

use perigee_backend::{BackendError, DType, Result};

use crate::backend::CudaBackend;
use crate::exchange::Exchange;
use crate::ops::logits::Head;
use crate::tensor::Tensor;

fn failed(error: impl std::fmt::Display) -> BackendError {
    BackendError::Collective(error.to_string())
}

/// Little-endian float32 numbers.
fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

impl CudaBackend {
    pub(crate) fn all_reduce_run(&mut self, x: &mut Tensor) -> Result<()> {
        let rows = self.tokens().min(x.rows);
        match &self.exchange {
            Exchange::Alone => return Ok(()),
            Exchange::Nccl(nccl) => return nccl.all_reduce(&self.stream, x.address(), rows * x.width, x.dtype),
            Exchange::Host(_) => {}
        }
        let mut values = self.read_rows(x, 0..rows)?;
        if let Exchange::Host(group) = &mut self.exchange {
            group.all_reduce(&mut values).map_err(failed)?;
        }
        self.write_rows(x, &values)
    }

    /// Makes room for the gather of `rows` rows of logits.
    pub(crate) fn reserve_gather(&mut self, rows: usize) -> Result<()> {
        match &mut self.exchange {
            Exchange::Nccl(nccl) => nccl.reserve_gather(&self.stream, rows * self.head_rows),
            Exchange::Alone | Exchange::Host(_) => Ok(()),
        }
    }

    /// Rank 0's tokens of the current step become those of all.
    pub(crate) fn share_tokens(&self) -> Result<()> {
        match &self.exchange {
            Exchange::Nccl(nccl) => nccl.broadcast(&self.stream, self.step.tokens.address, self.tokens()),
            Exchange::Alone => Ok(()),
            Exchange::Host(_) => Err(BackendError::Unsupported("steps ahead of what goes through host memory".into())),
        }
    }

    /// Where this rank's part of the logits is to be written, [rows, its rows of the head].
    pub(crate) fn logits_place(&mut self, head: &Head, rows: usize, out: &Tensor) -> Result<u64> {
        match &mut self.exchange {
            Exchange::Alone => Ok(out.address()),
            Exchange::Nccl(nccl) => nccl.gather_place(&self.stream, rows * head.most_rows()),
            Exchange::Host(group) => self.scratch.take(rows * head.counts()[group.rank()] * 4),
        }
    }

    /// Logits of all ranks, row by row, once this rank's part is at its place.
    pub(crate) fn gather_logits(&mut self, head: &Head, rows: usize, mine: u64, out: &mut Tensor) -> Result<()> {
        let counts = head.counts();
        let group = match &mut self.exchange {
            Exchange::Alone => return Ok(()),
            Exchange::Nccl(nccl) => {
                return nccl.gather_rows(&self.stream, (rows, rows * head.most_rows()), counts, &out.buffer);
            }
            Exchange::Host(group) => group,
        };
        let width = counts[group.rank()];
        let part = self.scratch.read(&self.stream, mine, rows * width * 4)?;
        let part = floats(&part);
        let shares: Vec<usize> = counts.iter().map(|count| count * rows).collect();
        let mut gathered = vec![0.0; shares.iter().sum()];
        group.all_gather(&part, &shares, &mut gathered).map_err(failed)?;
        // Ranks follow each other in the gathered values; a row of logits needs its pieces side by side.
        let mut values = Vec::with_capacity(gathered.len());
        for row in 0..rows {
            let mut before = 0;
            for (count, share) in counts.iter().zip(&shares) {
                values.extend_from_slice(&gathered[before + row * count..][..*count]);
                before += share;
            }
        }
        self.write_rows(out, &values)
    }

    /// Some rows of a tensor as float32.
    pub(crate) fn read_rows(&self, tensor: &Tensor, rows: Range<usize>) -> Result<Vec<f32>> {
        let row_bytes = tensor.width * tensor.dtype.bytes();
        let first = rows.start * row_bytes;
        if tensor.dtype == DType::Fp32 {
            let mut values = vec![0.0f32; rows.len() * tensor.width];
            self.stream.read(&tensor.buffer, first, bytemuck::cast_slice_mut(&mut values))?;
            return Ok(values);
        }
        let mut bytes = vec![0u8; rows.len() * row_bytes];
        self.stream.read(&tensor.buffer, first, &mut bytes)?;
        Ok(bytes.chunks_exact(2).map(|pair| half::bf16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect())
    }

    /// One row of a float32 tensor.
    pub(crate) fn read_row(&self, tensor: &Tensor, row: usize) -> Result<Vec<f32>> {
        tensor.expect("row read", row + 1, tensor.width, DType::Fp32)?;
        let mut values = vec![0.0f32; tensor.width];
        self.stream.read(&tensor.buffer, row * tensor.width * 4, bytemuck::cast_slice_mut(&mut values))?;
        Ok(values)
    }

    /// Overwrites the first rows of a tensor.
    pub(crate) fn write_rows(&self, tensor: &Tensor, values: &[f32]) -> Result<()> {
        if tensor.width == 0 || !values.len().is_multiple_of(tensor.width) || values.len() > tensor.rows * tensor.width
        {
            return Err(BackendError::shape("values written", &[tensor.rows, tensor.width], &[values.len()]));
        }
        match tensor.dtype {
            DType::Fp32 => self.stream.write(&tensor.buffer, 0, bytemuck::cast_slice(values)),
            DType::Bf16 => {
                let narrow: Vec<u8> =
                    values.iter().flat_map(|&value| half::bf16::from_f32(value).to_le_bytes()).collect();
                self.stream.write(&tensor.buffer, 0, &narrow)
            }
        }
    }
}
