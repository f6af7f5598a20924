//! Descriptions of matrices for the copy engine of Hopper GPUs: boxes of 64 columns of bfloat16, swizzled by 128 bytes.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys;
use perigee_backend::{BackendError, Result};

/// `common/tensor_map.h`
#[repr(C, align(64))]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct TensorMap([u64; 16]);

/// Rows of bfloat16 on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    /// Device address of the first element, a multiple of 16.
    pub(crate) address: u64,
    pub(crate) columns: usize,
    pub(crate) rows: usize,
    /// Elements from one row to the next, a multiple of 8.
    pub(crate) pitch: usize,
    /// Rows of a box.
    pub(crate) box_rows: u32,
}

impl TensorMap {
    /// A map that reads as zeros beyond the matrix.
    pub(crate) fn new(matrix: Rows) -> Result<Self> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let sizes = [matrix.columns as u64, matrix.rows as u64];
        let pitch = [2 * matrix.pitch as u64];
        let (boxes, steps) = ([64, matrix.box_rows], [1, 1]);
        // SAFETY: `map` has the alignment that its type states; the arrays have the lengths that a rank of 2 asks for; the
        // driver reads them before it returns and only records the address.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix.address as *mut _,
                sizes.as_ptr(),
                pitch.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|error| BackendError::Device(format!("describing {matrix:?} to the copy engine: {error:?}")))?;
        Ok(Self(map.opaque))
    }
}
