//! An activation matrix on the device and the matrices that weights become. Shapes are checked where an op takes them, so
//! that kernels need not.

use perigee_backend::{BackendError, DType, Result};

use crate::buffer::Buffer;

/// Rows of activations on the device, row-major.
#[derive(Debug)]
pub struct Tensor {
    pub(crate) buffer: Buffer,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) dtype: DType,
}

impl Tensor {
    /// Device address of the first element.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Fails unless the tensor has at least these rows, exactly this width and this type.
    pub(crate) fn expect(&self, what: &str, rows: usize, width: usize, dtype: DType) -> Result<()> {
        if self.rows >= rows && self.width == width && self.dtype == dtype {
            return Ok(());
        }
        Err(BackendError::Shape {
            what: what.into(),
            expected: format!("[{rows}, {width}] {dtype:?}"),
            found: format!("[{}, {}] {:?}", self.rows, self.width, self.dtype),
        })
    }
}

/// A weight matrix on the device: rows of `pitch` elements.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) buffer: Buffer,
    pub(crate) rows: usize,
    pub(crate) pitch: usize,
    pub(crate) dtype: DType,
}

impl Matrix {
    /// Device address of the first element.
    pub(crate) fn address(&self) -> u64 {
        self.buffer.address()
    }

    /// Device address of a row.
    pub(crate) fn row(&self, row: usize) -> u64 {
        self.address() + (row * self.pitch * self.dtype.bytes()) as u64
    }
}
