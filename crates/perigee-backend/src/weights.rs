//! Weights on their way to a device: a rank's slice of a tensor, and the bundles that make up a layer. The bytes may be
//! borrowed from a memory map, copied for a column slice, or not exist at all: a random weight is a rule, which a device
//! can follow by itself.

use std::borrow::Cow;

use crate::error::{BackendError, Result};
use crate::random::RandomFill;

/// Element types of stored tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// bfloat16.
    Bf16,
    /// IEEE float32.
    Fp32,
}

impl DType {
    /// Size of an element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp32 => 4,
        }
    }
}

/// Where the elements of a slice come from.
#[derive(Debug, Clone)]
pub enum TensorSource<'a> {
    /// Little-endian elements, row-major.
    Bytes(Cow<'a, [u8]>),
    /// A rule that gives every element; rounded to the slice's dtype.
    Random(RandomFill),
}

/// A rank's slice of a checkpoint tensor, viewed as a matrix or vector.
#[derive(Debug, Clone)]
pub struct TensorSlice<'a> {
    /// The tensor's name in the checkpoint, for errors.
    pub name: String,
    /// Shape of the slice, row-major; one or two dimensions.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
    /// The elements.
    pub source: TensorSource<'a>,
}

impl TensorSlice<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size in bytes as stored.
    pub fn bytes(&self) -> u64 {
        (self.elements() * self.dtype.bytes()) as u64
    }

    /// Fails unless the slice has this shape.
    pub fn expect(&self, shape: &[usize]) -> Result<()> {
        if self.shape == shape {
            return Ok(());
        }
        Err(BackendError::shape(&self.name, shape, &self.shape))
    }

    /// The elements as float32, whatever the source; for small tensors and for the reference backend.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match &self.source {
            TensorSource::Random(fill) => Ok(fill.values(&self.shape, self.dtype)),
            TensorSource::Bytes(bytes) => {
                self.check_bytes(bytes)?;
                Ok(match self.dtype {
                    DType::Fp32 => {
                        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
                    }
                    DType::Bf16 => {
                        bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
                    }
                })
            }
        }
    }

    /// The elements as bfloat16; only for slices stored so.
    pub fn to_bf16(&self) -> Result<Vec<half::bf16>> {
        if self.dtype != DType::Bf16 {
            return Err(BackendError::Unsupported(format!("{} is stored as float32, not bfloat16", self.name)));
        }
        match &self.source {
            TensorSource::Random(fill) => {
                Ok(fill.values(&self.shape, self.dtype).into_iter().map(half::bf16::from_f32).collect())
            }
            TensorSource::Bytes(bytes) => {
                self.check_bytes(bytes)?;
                Ok(bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]])).collect())
            }
        }
    }

    fn check_bytes(&self, bytes: &[u8]) -> Result<()> {
        if bytes.len() as u64 == self.bytes() {
            return Ok(());
        }
        Err(BackendError::shape(format!("{} (bytes)", self.name), &[self.bytes() as usize], &[bytes.len()]))
    }
}

/// Tensors of a KDA layer; P = heads of this rank times D.
#[derive(Debug)]
pub struct KdaWeights<'a> {
    /// `[P, d]` each, q then k then v.
    pub qkv_proj: [TensorSlice<'a>; 3],
    /// `[P, W]` each, q then k then v; the last tap multiplies the current token.
    pub qkv_conv: [TensorSlice<'a>; 3],
    /// `[D, d]`, replicated.
    pub f_a_proj: TensorSlice<'a>,
    /// `[P, D]`.
    pub f_b_proj: TensorSlice<'a>,
    /// `[P]`.
    pub dt_bias: TensorSlice<'a>,
    /// `[heads]`.
    pub a_log: TensorSlice<'a>,
    /// `[heads, d]`.
    pub b_proj: TensorSlice<'a>,
    /// `[D, d]`, replicated.
    pub g_a_proj: TensorSlice<'a>,
    /// `[P, D]`.
    pub g_b_proj: TensorSlice<'a>,
    /// `[D]`, shared by all heads.
    pub o_norm: TensorSlice<'a>,
    /// `[d, P]`: the columns of this rank's heads; partial sums follow.
    pub o_proj: TensorSlice<'a>,
}

/// The query projection of an MLA layer.
#[derive(Debug)]
pub enum QueryWeights<'a> {
    /// One q_proj, `[heads (n + r), d]`.
    Full(TensorSlice<'a>),
    /// Low-rank: down `[rq, d]` (replicated), norm `[rq]`, up `[heads (n + r), rq]`.
    LowRank {
        /// q_a_proj.
        down: TensorSlice<'a>,
        /// q_a_layernorm.
        norm: TensorSlice<'a>,
        /// q_b_proj.
        up: TensorSlice<'a>,
    },
}

/// Tensors of an MLA layer.
#[derive(Debug)]
pub struct MlaWeights<'a> {
    /// The query projection.
    pub query: QueryWeights<'a>,
    /// kv_a_proj_with_mqa, `[R + r, d]`, replicated.
    pub kv_a_proj: TensorSlice<'a>,
    /// kv_a_layernorm, `[R]`.
    pub kv_a_norm: TensorSlice<'a>,
    /// kv_b_proj, `[heads (n + m), R]`: per head n key rows, then m value rows.
    pub kv_b_proj: TensorSlice<'a>,
    /// `[d, heads m]`: the columns of this rank's heads; partial sums follow.
    pub o_proj: TensorSlice<'a>,
}

/// Tensors of a gated MLP: `[width, d]`, `[width, d]`, `[d, width]`.
#[derive(Debug)]
pub struct MlpWeights<'a> {
    /// gate_proj (w1).
    pub gate: TensorSlice<'a>,
    /// up_proj (w3).
    pub up: TensorSlice<'a>,
    /// down_proj (w2).
    pub down: TensorSlice<'a>,
}

/// Tensors of a mixture-of-experts layer.
#[derive(Debug)]
pub struct MoeWeights<'a> {
    /// Router, `[E, d]`, replicated.
    pub router: TensorSlice<'a>,
    /// e_score_correction_bias, `[E]`; selects only.
    pub bias: TensorSlice<'a>,
    /// Routed experts in order.
    pub experts: Vec<MlpWeights<'a>>,
    /// Shared experts as one MLP, or none.
    pub shared: Option<MlpWeights<'a>>,
}
