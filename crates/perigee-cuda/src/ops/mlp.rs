//! The gated MLP: one product for gate and up together, the activation, one product down. Also the shared experts.

use perigee_backend::weights::MlpWeights;
use perigee_backend::{MlpShape, Result};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::loader::{Loader, Placement};
use crate::needs;
use crate::params::ElementParams;
use crate::stream::Grid;
use crate::tensor::{Matrix, Tensor};

/// A dense MLP.
#[derive(Debug)]
pub struct Mlp {
    shape: MlpShape,
    /// [2 width, d]: gate rows, then up rows.
    gate_up: Matrix,
    /// [d, width]
    down: Matrix,
}

/// Device addresses of the weights of a gated MLP.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GatedWeights {
    /// [2 width, d]
    pub(crate) gate_up: u64,
    /// [d, width]
    pub(crate) down: u64,
    /// Gate rows and up rows alternate in blocks of this size; 0 for gate rows, then up rows.
    pub(crate) block: u32,
}

impl CudaBackend {
    pub(crate) fn mlp_load(&mut self, shape: &MlpShape, weights: &MlpWeights<'_>) -> Result<Mlp> {
        weights.gate.expect(&[shape.width, shape.hidden])?;
        weights.up.expect(&[shape.width, shape.hidden])?;
        weights.down.expect(&[shape.hidden, shape.width])?;
        let name = &weights.gate.name;
        let gate_up = Loader::matrix(&self.stream, 2 * shape.width, shape.hidden, self.precision, name)?;
        self.loader.place(&self.stream, &self.kernels, &weights.gate, &gate_up, Placement::at(0))?;
        self.loader.place(&self.stream, &self.kernels, &weights.up, &gate_up, Placement::at(shape.width))?;
        let down = self.load_matrix(&weights.down)?;
        self.scratch.require(needs::mlp(shape, self.precision.bytes()));
        Ok(Mlp { shape: *shape, gate_up, down })
    }

    pub(crate) fn mlp_run(&mut self, layer: &Mlp, x: &Tensor, out: &Tensor) -> Result<()> {
        self.settle_norm()?;
        x.expect("mlp input", self.tokens(), layer.shape.hidden, self.precision)?;
        out.expect("mlp output", self.tokens(), layer.shape.hidden, self.precision)?;
        self.scratch.reset();
        self.mlp_rows(layer, x.address(), out.address())
    }

    /// The MLP of the step's tokens, between two device addresses; takes working memory.
    pub(crate) fn mlp_rows(&mut self, layer: &Mlp, x: u64, out: u64) -> Result<()> {
        let weights = GatedWeights { gate_up: layer.gate_up.address(), down: layer.down.address(), block: 0 };
        self.mlp_products(layer.shape, weights, x, out)
    }

    /// The same with weights by address.
    pub(crate) fn mlp_products(&mut self, shape: MlpShape, weights: GatedWeights, x: u64, out: u64) -> Result<()> {
        let (tokens, hidden, width) = (self.tokens(), shape.hidden, shape.width);
        let element = self.precision.bytes();
        let both = self.scratch.take(tokens * 2 * width * element)?;
        let inner = self.scratch.take(tokens * width * element)?;
        let product = Product::dense(tokens, hidden, 2 * width, self.precision);
        self.dense(&product, Operands { input: x, weight: weights.gate_up, out: both })?;
        let count = tokens * width;
        let params =
            ElementParams { input: both, out: inner, count: count as u64, width: width as u32, block: weights.block };
        // Eight elements a thread.
        let grid = Grid::new(count.div_ceil(8 * 256).min(1 << 16), 1, 256);
        self.stream.launch(&self.kernels.silu_mul, grid, &params)?;
        let product = Product::dense(tokens, width, hidden, self.precision);
        self.dense(&product, Operands { input: inner, weight: weights.down, out })
    }
}
