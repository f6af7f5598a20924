//! Activations of the CPU backend: always float32 in memory; where the backend is opened in bfloat16, ops round what they
//! write to activation tensors, so that the numbers are those of a bfloat16 engine.

use perigee_backend::{BackendError, DType, Precision, Result};

/// A row-major matrix.
#[derive(Debug, Clone)]
pub struct Tensor {
    rows: usize,
    width: usize,
    /// Whether values are rounded to bfloat16 when written.
    rounded: bool,
    data: Vec<f32>,
}

impl Tensor {
    /// A poisoned tensor.
    pub(crate) fn new(rows: usize, width: usize, precision: Precision, activation: DType) -> Self {
        let rounded = precision == Precision::Activation && activation == DType::Bf16;
        Self { rows, width, rounded, data: vec![f32::NAN; rows * width] }
    }

    /// Numbers in a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// The first `rows` rows.
    pub(crate) fn head(&self, rows: usize) -> Result<&[f32]> {
        self.check(rows)?;
        Ok(&self.data[..rows * self.width])
    }

    /// The first `rows` rows, to write; call [`Self::settle`] when done.
    pub(crate) fn head_mut(&mut self, rows: usize) -> Result<&mut [f32]> {
        self.check(rows)?;
        Ok(&mut self.data[..rows * self.width])
    }

    /// Rounds the first `rows` rows where this tensor is kept in bfloat16.
    pub(crate) fn settle(&mut self, rows: usize) {
        if self.rounded {
            round_bf16(&mut self.data[..rows * self.width]);
        }
    }

    /// Fails unless rows have this width.
    pub(crate) fn expect_width(&self, what: &str, width: usize) -> Result<()> {
        if self.width == width {
            return Ok(());
        }
        Err(BackendError::shape(what, &[self.rows, width], &[self.rows, self.width]))
    }

    fn check(&self, rows: usize) -> Result<()> {
        if rows <= self.rows {
            return Ok(());
        }
        Err(BackendError::Range { what: "tensor row", index: rows as u64, limit: self.rows as u64 })
    }
}

/// Rounds in place to the nearest bfloat16, ties to even.
pub(crate) fn round_bf16(values: &mut [f32]) {
    for value in values {
        *value = half::bf16::from_f32(*value).to_f32();
    }
}
