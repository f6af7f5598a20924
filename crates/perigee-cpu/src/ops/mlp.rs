//! The gated MLP, (silu(x g^T) . (x u^T)) d^T: dense layers, shared experts and, one by one, routed experts.

use perigee_backend::weights::MlpWeights;
use perigee_backend::{MlpShape, Result};

use crate::matrix::Matrix;
use crate::simd;
use crate::tensor::round_bf16;
use crate::workers::Workers;

/// Weights of a gated MLP on this rank.
#[derive(Debug)]
pub struct Mlp {
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Mlp {
    pub(crate) fn load(shape: &MlpShape, weights: &MlpWeights<'_>) -> Result<Self> {
        Ok(Self {
            gate: Matrix::load(&weights.gate, shape.width, shape.hidden)?,
            up: Matrix::load(&weights.up, shape.width, shape.hidden)?,
            down: Matrix::load(&weights.down, shape.hidden, shape.width)?,
        })
    }

    /// This rank's partial sum, spread over the workers. `rounded` rounds intermediates to bfloat16.
    pub(crate) fn forward(&self, workers: &Workers, x: &[f32], rounded: bool, out: &mut [f32]) {
        let tokens = out.len() / self.down.rows();
        let mut gate = vec![0f32; tokens * self.gate.rows()];
        let mut up = vec![0f32; tokens * self.up.rows()];
        self.gate.product(workers, x, &mut gate);
        self.up.product(workers, x, &mut up);
        activate(&mut gate, &mut up, rounded);
        self.down.product(workers, &gate, out);
    }

    /// The same on this thread alone.
    pub(crate) fn forward_serial(&self, x: &[f32], rounded: bool, out: &mut [f32]) {
        let tokens = out.len() / self.down.rows();
        let mut gate = vec![0f32; tokens * self.gate.rows()];
        let mut up = vec![0f32; tokens * self.up.rows()];
        self.gate.product_serial(x, &mut gate);
        self.up.product_serial(x, &mut up);
        activate(&mut gate, &mut up, rounded);
        self.down.product_serial(&gate, out);
    }
}

/// gate = silu(gate) . up.
fn activate(gate: &mut [f32], up: &mut [f32], rounded: bool) {
    if rounded {
        round_bf16(gate);
        round_bf16(up);
    }
    simd::silu_times(gate, up);
    if rounded {
        round_bf16(gate);
    }
}
