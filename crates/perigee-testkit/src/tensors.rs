//! The tensors of a safetensors file as plain numbers: float32 or integers, whatever their stored width. For outputs and
//! expectations of a few megabytes; weights are read elsewhere.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors};

use crate::error::{Result, TestkitError};

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// A tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Elements, row-major.
    pub values: Values,
}

/// Elements of one of two kinds.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// float32.
    Floats(Vec<f32>),
    /// int32 or int64.
    Integers(Vec<i64>),
}

impl Tensor {
    /// A float32 tensor.
    pub fn floats(shape: &[usize], values: Vec<f32>) -> Self {
        Self { shape: shape.to_vec(), values: Values::Floats(values) }
    }

    /// An integer tensor.
    pub fn integers(shape: &[usize], values: Vec<i64>) -> Self {
        Self { shape: shape.to_vec(), values: Values::Integers(values) }
    }

    /// The first index's size: positions, heads or tokens.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(0)
    }

    /// Elements of one row.
    pub fn width(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Some of its rows.
    pub fn slice(&self, rows: std::ops::Range<usize>) -> Self {
        let span = rows.start * self.width()..rows.end * self.width();
        let values = match &self.values {
            Values::Floats(values) => Values::Floats(values[span].to_vec()),
            Values::Integers(values) => Values::Integers(values[span].to_vec()),
        };
        let mut shape = self.shape.clone();
        shape[0] = rows.len();
        Self { shape, values }
    }
}

/// Reads a file.
///
/// # Errors
/// The file cannot be read, or holds something else than float32, int32 and int64 tensors.
pub fn read(path: &Path) -> Result<Tensors> {
    parse(&std::fs::read(path).map_err(TestkitError::file(path))?)
}

/// Reads a file's bytes.
///
/// # Errors
/// They hold something else than float32, int32 and int64 tensors.
pub fn parse(bytes: &[u8]) -> Result<Tensors> {
    let fault = |message: String| TestkitError::Safetensors(message);
    let file = SafeTensors::deserialize(bytes).map_err(|error| fault(error.to_string()))?;
    let tensors = file.iter().map(|(name, view)| {
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => Values::Floats(data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
            Dtype::I32 => Values::Integers(data.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b).into()).collect()),
            Dtype::I64 => Values::Integers(data.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
            other => return Err(fault(format!("{name}: expected F32, I32 or I64, found {other:?}"))),
        };
        Ok((name.to_owned(), Tensor { shape: view.shape().to_vec(), values }))
    });
    tensors.collect()
}

/// Writes float32 and int64 tensors as a file.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, tensors: &Tensors) -> Result<()> {
    let stored = tensors.iter().map(|(name, tensor)| match &tensor.values {
        Values::Floats(values) => (name, Dtype::F32, tensor, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        Values::Integers(values) => (name, Dtype::I64, tensor, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
    });
    let stored: Vec<(&String, Dtype, &Tensor, Vec<u8>)> = stored.collect();
    let mut views = Vec::with_capacity(stored.len());
    for (name, dtype, tensor, bytes) in &stored {
        let view = safetensors::tensor::TensorView::new(*dtype, tensor.shape.clone(), bytes);
        views.push((name.as_str(), view.map_err(|error| TestkitError::Safetensors(error.to_string()))?));
    }
    let bytes = safetensors::serialize(views, None).map_err(|error| TestkitError::Safetensors(error.to_string()))?;
    std::fs::write(path, bytes).map_err(TestkitError::file(path))
}
