//! Dense products through cuBLASLt: bfloat16 or float32 operands, float32 accumulation, never TF32. A plan (descriptors and
//! algorithm) is made once for each shape; running one queues work and allocates nothing.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};

use cudarc::cublaslt::{result, sys};
use perigee_backend::{BackendError, DType, Result};

use crate::buffer::Buffer;
use crate::stream::Stream;

const WORKSPACE_BYTES: usize = 32 << 20;

/// out [rows, out] = in [rows, depth] . weight, for each of `batch` problems. Pitches and strides count elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Product {
    pub(crate) rows: usize,
    pub(crate) depth: usize,
    pub(crate) out: usize,
    /// Whether the weight is stored [out, depth], as checkpoints do; else [depth, out].
    pub(crate) transposed: bool,
    pub(crate) input_pitch: usize,
    pub(crate) weight_pitch: usize,
    pub(crate) out_pitch: usize,
    pub(crate) batch: usize,
    pub(crate) input_stride: usize,
    pub(crate) weight_stride: usize,
    pub(crate) out_stride: usize,
    pub(crate) operand: DType,
    pub(crate) result: DType,
}

impl Hash for Product {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Products that differ elsewhere too are rare; equality tells them apart.
        (self.rows, self.depth, self.out, self.batch).hash(state);
    }
}

impl Product {
    /// One product with a weight stored [out, depth], all rows dense.
    pub(crate) fn dense(rows: usize, depth: usize, out: usize, dtype: DType) -> Self {
        Self {
            rows,
            depth,
            out,
            transposed: true,
            input_pitch: depth,
            weight_pitch: depth,
            out_pitch: out,
            batch: 1,
            input_stride: 0,
            weight_stride: 0,
            out_stride: 0,
            operand: dtype,
            result: dtype,
        }
    }
}

/// Device addresses of a product's three matrices.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Operands {
    pub(crate) input: u64,
    pub(crate) weight: u64,
    pub(crate) out: u64,
}

/// The library, its workspace and the plans made so far.
#[derive(Debug)]
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer,
    plans: HashMap<(Product, [u32; 3]), Plan>,
}

impl Blas {
    pub(crate) fn new(stream: &Stream) -> Result<Self> {
        stream.device().bind()?;
        let workspace = Buffer::new(stream.device(), WORKSPACE_BYTES, "workspace of dense products")?;
        let handle = result::create_handle().map_err(fault("opening cuBLASLt"))?;
        Ok(Self { handle, workspace, plans: HashMap::new() })
    }

    /// Queues a product.
    pub(crate) fn run(&mut self, stream: &Stream, product: &Product, operands: Operands) -> Result<()> {
        if product.rows == 0 || product.out == 0 {
            return Ok(());
        }
        let alignments = alignments(product, operands);
        let key = (*product, alignments);
        if !self.plans.contains_key(&key) {
            let plan = Plan::new(self.handle, product, alignments)?;
            self.plans.insert(key, plan);
        }
        let Some(plan) = self.plans.get(&key) else { return Ok(()) };
        stream.device().bind()?;
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: handle, descriptors and algorithm are alive (owned by self and the plan); the addresses are device
        // memory that holds matrices of the planned shapes (checked by the ops); the scalars are read before the call
        // returns, since the pointer mode is host. The workspace is used by one stream only, so in order.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&zero).cast(),
                operands.weight as *const _,
                plan.weight,
                operands.input as *const _,
                plan.input,
                operands.out as *const _,
                plan.out,
                operands.out as *mut _,
                plan.out,
                &plan.algorithm,
                self.workspace.address() as *mut _,
                WORKSPACE_BYTES,
                stream.raw().cast(),
            )
        }
        .map_err(|error| BackendError::Device(format!("{product:?}: {error}")))
    }
}

// SAFETY: a cuBLASLt handle and its descriptors may be used from any thread, by one at a time for descriptors that change;
// these never change after `Plan::new`, and `run` takes the value exclusively.
unsafe impl Send for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: the handle was created by `new` and is destroyed once, after the plans.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// Descriptors of one product, in the library's column-major words: the weight is its A, the input its B.
#[derive(Debug)]
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, product: &Product, alignments: [u32; 3]) -> Result<Self> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let operation = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)
            .map_err(fault("describing a product"))?;
        let operand = data_type(product.operand);
        let (weight_rows, weight_columns) =
            if product.transposed { (product.depth, product.out) } else { (product.out, product.depth) };
        let layout = |dtype, rows, columns, pitch, stride| layout(dtype, (rows, columns), pitch, product.batch, stride);
        let mut plan = Self {
            operation,
            weight: layout(operand, weight_rows, weight_columns, product.weight_pitch, product.weight_stride)?,
            input: layout(operand, product.depth, product.rows, product.input_pitch, product.input_stride)?,
            out: layout(data_type(product.result), product.out, product.rows, product.out_pitch, product.out_stride)?,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        if product.transposed {
            // CUBLAS_OP_T; the bindings of this library leave the enumeration out.
            let transpose = 1i32;
            // SAFETY: the descriptor is alive; the attribute is a C enumeration, which has the size of this integer.
            unsafe {
                result::set_matmul_desc_attribute(
                    plan.operation,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                    std::ptr::from_ref(&transpose).cast(),
                    size_of_val(&transpose),
                )
            }
            .map_err(fault("describing a product"))?;
        }
        plan.algorithm = plan.choose(handle, alignments, product)?;
        Ok(plan)
    }

    fn choose(
        &self,
        handle: sys::cublasLtHandle_t,
        alignments: [u32; 3],
        product: &Product,
    ) -> Result<sys::cublasLtMatmulAlgo_t> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = result::create_matmul_pref().map_err(fault("choosing an algorithm"))?;
        let [weight, input, out] = alignments;
        let set = |attribute, value: &[u8]| {
            // SAFETY: the preference is alive; each attribute is set with a value of its documented size.
            unsafe { result::set_matmul_pref_attribute(preference, attribute, value.as_ptr().cast(), value.len()) }
        };
        let chosen = set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES.to_ne_bytes())
            .and_then(|()| set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &weight.to_ne_bytes()))
            .and_then(|()| set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &input.to_ne_bytes()))
            .and_then(|()| set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out.to_ne_bytes()))
            .and_then(|()| set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out.to_ne_bytes()))
            .and_then(|()| {
                // SAFETY: all descriptors are alive.
                unsafe {
                    result::get_matmul_algo_heuristic(
                        handle,
                        self.operation,
                        self.weight,
                        self.input,
                        self.out,
                        self.out,
                        preference,
                    )
                }
            });
        // SAFETY: created above, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        chosen
            .map(|found| found.algo)
            .map_err(|error| BackendError::Unsupported(format!("cuBLASLt has no algorithm for {product:?} ({error})")))
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each descriptor was created for this plan and is destroyed once.
        unsafe {
            let _ = result::destroy_matmul_desc(self.operation);
            let _ = result::destroy_matrix_layout(self.weight);
            let _ = result::destroy_matrix_layout(self.input);
            let _ = result::destroy_matrix_layout(self.out);
        }
    }
}

fn layout(
    dtype: sys::cudaDataType_t,
    (rows, columns): (usize, usize),
    pitch: usize,
    batch: usize,
    stride: usize,
) -> Result<sys::cublasLtMatrixLayout_t> {
    use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
    let layout = result::create_matrix_layout(dtype, rows as u64, columns as u64, pitch as i64)
        .map_err(fault("describing a matrix"))?;
    if batch > 1 {
        let (count, stride) = (batch as i32, stride as i64);
        // SAFETY: the layout is alive; the attributes have the sizes of these two integers.
        unsafe {
            result::set_matrix_layout_attribute(
                layout,
                Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                std::ptr::from_ref(&count).cast(),
                size_of_val(&count),
            )
            .and_then(|()| {
                result::set_matrix_layout_attribute(
                    layout,
                    Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                    std::ptr::from_ref(&stride).cast(),
                    size_of_val(&stride),
                )
            })
        }
        .map_err(fault("describing a batch of matrices"))?;
    }
    Ok(layout)
}

fn data_type(dtype: DType) -> sys::cudaDataType_t {
    match dtype {
        DType::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        DType::Fp32 => sys::cudaDataType_t::CUDA_R_32F,
    }
}

/// Largest power of two, up to 256, that divides the address, the row and the stride of each matrix: weight, input, out.
fn alignments(product: &Product, operands: Operands) -> [u32; 3] {
    let (operand, result) = (product.operand.bytes(), product.result.bytes());
    let power = |address: u64, pitch: usize, stride: usize| {
        let bits = address | pitch as u64 | stride as u64 | 256;
        1u32 << bits.trailing_zeros()
    };
    [
        power(operands.weight, product.weight_pitch * operand, product.weight_stride * operand),
        power(operands.input, product.input_pitch * operand, product.input_stride * operand),
        power(operands.out, product.out_pitch * result, product.out_stride * result),
    ]
}

fn fault(what: &str) -> impl FnOnce(result::CublasError) -> BackendError + '_ {
    move |error| BackendError::Device(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_is_the_least_of_address_row_and_stride() {
        let mut product = Product::dense(4, 64, 12, DType::Bf16);
        let operands = Operands { input: 0x1000, weight: 0x1010, out: 0x1000 };
        assert_eq!(alignments(&product, operands), [16, 128, 8]);
        product.result = DType::Fp32;
        assert_eq!(alignments(&product, operands), [16, 128, 16]);
    }
}
