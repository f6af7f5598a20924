//! The KDA mixer: one product for everything that reads the layer's input, one for the two low-rank gates, the recurrence,
//! and the output projection.

use perigee_backend::weights::KdaWeights;
use perigee_backend::{BackendError, DType, KdaShape, Result, TensorSlice};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::buffer::Buffer;
use crate::formula::Fault;
use crate::kernels::KdaFast;
use crate::loader::{Loader, Placement};
use crate::module::Kernel;
use crate::needs;
use crate::params::KdaParams;
use crate::step::Section;
use crate::stream::Grid;
use crate::tensor::{Matrix, Tensor};
use crate::tuning::tuning;

/// Most channels of a head, one thread each.
const MOST_CHANNELS: usize = 1024;

/// A KDA layer's mixer; P = heads * head_dim.
#[derive(Debug)]
pub struct Kda {
    shape: KdaShape,
    /// [3 P + 2 D + heads, padded to 8; d]: q, k, v, f_a, g_a, b.
    projection: Matrix,
    /// [2 P, D]: f_b, g_b.
    gates: Matrix,
    /// [taps][3 P]
    conv: Buffer,
    dt_bias: Buffer,
    a_log: Buffer,
    o_norm: Buffer,
    /// [d, P]
    output: Matrix,
}

impl Kda {
    fn channels(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }
}

impl CudaBackend {
    pub(crate) fn kda_load(&mut self, shape: &KdaShape, weights: &KdaWeights<'_>) -> Result<Kda> {
        check(shape, weights)?;
        let (dim, hidden) = (shape.head_dim, shape.hidden);
        let channels = shape.heads * dim;
        let width = needs::kda_width(shape);
        let name = &weights.f_a_proj.name;
        let projection = Loader::matrix(&self.stream, width, hidden, self.precision, name)?;
        let [q, k, v] = &weights.qkv_proj;
        let mut row = 0;
        for slice in [q, k, v, &weights.f_a_proj, &weights.g_a_proj, &weights.b_proj] {
            self.loader.place(&self.stream, &self.kernels, slice, &projection, Placement::at(row))?;
            row += slice.shape[0];
        }
        let gates = Loader::matrix(&self.stream, 2 * channels, dim, self.precision, name)?;
        self.loader.place(&self.stream, &self.kernels, &weights.f_b_proj, &gates, Placement::at(0))?;
        self.loader.place(&self.stream, &self.kernels, &weights.g_b_proj, &gates, Placement::at(channels))?;
        self.scratch.require(needs::kda(shape, self.precision.bytes()));
        Ok(Kda {
            shape: *shape,
            projection,
            gates,
            conv: self.kda_conv(shape, &weights.qkv_conv)?,
            dt_bias: self.loader.vector(&self.stream, &self.kernels, &weights.dt_bias)?,
            a_log: self.loader.vector(&self.stream, &self.kernels, &weights.a_log)?,
            o_norm: self.loader.vector(&self.stream, &self.kernels, &weights.o_norm)?,
            output: self.load_matrix(&weights.o_proj)?,
        })
    }

    /// The three convolutions as [taps][3 P] float32, so that neighbouring threads read neighbouring words.
    fn kda_conv(&mut self, shape: &KdaShape, slices: &[TensorSlice<'_>; 3]) -> Result<Buffer> {
        let channels = shape.heads * shape.head_dim;
        let mut values = vec![0.0; shape.conv * 3 * channels];
        let mut stored = 0;
        for (which, slice) in slices.iter().enumerate() {
            for (at, value) in slice.to_f32()?.into_iter().enumerate() {
                let (channel, tap) = (at / shape.conv, at % shape.conv);
                let tap = if self.formula.has(Fault::ReversedTaps) { shape.conv - 1 - tap } else { tap };
                values[tap * 3 * channels + which * channels + channel] = value;
            }
            stored += slice.bytes();
        }
        self.loader.values(&self.stream, &values, stored, &slices[0].name)
    }

    pub(crate) fn kda_run(&mut self, layer: &Kda, index: usize, x: &Tensor, out: &Tensor) -> Result<()> {
        let tokens = self.tokens();
        let shape = layer.shape;
        x.expect("kda_mixer input", tokens, shape.hidden, self.precision)?;
        out.expect("kda_mixer output", tokens, shape.hidden, self.precision)?;
        let (channels, width, element) = (layer.channels(), layer.projection.rows, self.precision.bytes());
        let [projected, gates, mixed] = self.kda_places(layer)?;
        let product = Product::dense(tokens, shape.hidden, width, self.precision);
        let operands = Operands { input: x.address(), weight: layer.projection.address(), out: projected };
        self.dense_after_norm(&product, operands)?;
        if self.kda_gates_kernel(layer).is_none() {
            let product = Product {
                input_pitch: width,
                out_pitch: 2 * channels,
                batch: 2,
                input_stride: shape.head_dim,
                weight_stride: channels * shape.head_dim,
                out_stride: channels,
                result: DType::Fp32,
                ..Product::dense(tokens, shape.head_dim, channels, self.precision)
            };
            let input = projected + (3 * channels * element) as u64;
            self.dense(&product, Operands { input, weight: layer.gates.address(), out: gates })?;
        }

        self.kda_kernels(layer, index, [projected, gates, mixed])?;
        let product = Product::dense(tokens, channels, shape.hidden, self.precision);
        let operands = Operands { input: mixed, weight: layer.output.address(), out: out.address() };
        self.dense(&product, operands)
    }

    /// Working memory: the input's products, the gates, and what goes into the output product.
    fn kda_places(&mut self, layer: &Kda) -> Result<[u64; 3]> {
        let (tokens, element) = (self.tokens(), self.precision.bytes());
        self.scratch.reset();
        Ok([
            self.scratch.take(tokens * layer.projection.rows * element)?,
            self.scratch.take(tokens * 2 * layer.channels() * 4)?,
            self.scratch.take(tokens * layer.channels() * element)?,
        ])
    }

    /// Everything between the products.
    fn kda_kernels(&mut self, layer: &Kda, index: usize, places: [u64; 3]) -> Result<()> {
        let params = self.kda_params(layer, index, places)?;
        match self.kda_fast(layer.shape.head_dim) {
            Some(fast) => {
                self.kda_decode(layer, fast, &params)?;
                self.kda_prefill(fast, &params, false)
            }
            None => {
                self.kda_recurrent(&params, self.step.decode_rows)?;
                self.kda_recurrent(&params, self.step.prefill_rows)
            }
        }
    }

    /// The KDA mixer without its products, on what the last `kda_mixer` of this step left in working memory: for
    /// measurements beside implementations that have no products.
    ///
    /// # Errors
    /// As the mixer's.
    pub fn kda_without_products(&mut self, layer: &Kda, index: usize) -> Result<()> {
        let places = self.kda_places(layer)?;
        self.kda_kernels(layer, index, places)
    }

    /// What the KDA mixer does by chunks alone, for rows of several tokens: neither products nor the convolution, whose results of
    /// the last `kda_mixer` of this step it reads in working memory, nor the gated norm. For measurements like those above.
    ///
    /// # Errors
    /// As the mixer's.
    pub fn kda_chunks_alone(&mut self, layer: &Kda, index: usize) -> Result<()> {
        let places = self.kda_places(layer)?;
        let params = self.kda_params(layer, index, places)?;
        match self.kda_fast(layer.shape.head_dim) {
            Some(fast) => self.kda_prefill(fast, &params, true),
            None => Ok(()),
        }
    }

    fn kda_params(&self, layer: &Kda, index: usize, [projected, gates, mixed]: [u64; 3]) -> Result<KdaParams> {
        let shape = layer.shape;
        let cache = self.cache()?;
        let of_cache = (cache.shape().kda_heads, cache.shape().kda_head_dim, cache.shape().conv);
        if of_cache != (shape.heads, shape.head_dim, shape.conv) {
            return Err(BackendError::shape(
                "state slots (heads, head_dim, conv)",
                &[shape.heads, shape.head_dim, shape.conv],
                &[of_cache.0, of_cache.1, of_cache.2],
            ));
        }
        if index >= cache.shape().kda_layers {
            let limit = cache.shape().kda_layers as u64;
            return Err(BackendError::Range { what: "KDA layer", index: index as u64, limit });
        }
        Ok(KdaParams {
            projected,
            gates,
            conv: layer.conv.address(),
            dt_bias: layer.dt_bias.address(),
            a_log: layer.a_log.address(),
            o_norm: layer.o_norm.address(),
            state: cache.state(),
            tails: cache.tails(),
            mixed,
            gate_weights: layer.gates.address(),
            rows: 0,
            chunks: self.step.chunks.address,
            convolved: 0,
            query: 0,
            key: 0,
            erase: 0,
            update: 0,
            attention: 0,
            decay: 0,
            row_chunks: self.step.row_chunks.address,
            projected_pitch: layer.projection.rows as u32,
            heads: shape.heads as u32,
            head_dim: shape.head_dim as u32,
            taps: shape.conv as u32,
            layer: index as u32,
            layers: cache.shape().kda_layers as u32,
            eps: if self.formula.has(Fault::OutputNormEpsilon) { 1e-6 } else { shape.eps },
            query_scale: if self.formula.has(Fault::NoQueryScale) {
                1.0
            } else {
                (1.0 / (shape.head_dim as f64).sqrt()) as f32
            },
            first_row: 0,
            first_chunk: 0,
        })
    }

    /// Position among the kernels of the head sizes that have them.
    pub(crate) fn kda_fast(&self, head_dim: usize) -> Option<usize> {
        self.kernels.kda_fast.iter().position(|fast| fast.head_dim == head_dim)
    }

    /// The kernel that computes the step with its gates, where the step is few rows of one token.
    fn kda_gates_kernel(&self, layer: &Kda) -> Option<&Kernel<KdaParams>> {
        let fast = self.kda_fast(layer.shape.head_dim)?;
        let is_few = self.step.prefill_rows.count == 0 && self.step.decode_rows.count <= tuning().gates;
        let fits = is_few && layer.shape.conv == KdaFast::SPLIT_TAPS;
        self.kernels.kda_fast[fast].decode_split.as_ref().filter(|_| fits)
    }

    /// Rows of one token in one fused kernel.
    fn kda_decode(&self, layer: &Kda, fast: usize, params: &KdaParams) -> Result<()> {
        let rows = self.step.decode_rows;
        let params = KdaParams { rows: rows.address, ..*params };
        // Heads of a row follow each other, as their states do.
        let grid = Grid::new(params.heads as usize, rows.count, 256);
        let fast = &self.kernels.kda_fast[fast];
        match (self.kda_gates_kernel(layer), &fast.decode_bulk) {
            (Some(kernel), _) => {
                let grid = Grid::new(KdaFast::SPLIT * params.heads as usize, rows.count, 256);
                self.stream.launch(kernel, grid, &params)
            }
            (None, Some(bulk)) if rows.count >= tuning().bulk => {
                self.stream.launch(bulk, grid.shared(fast.state_shared), &params)
            }
            _ => self.stream.launch(&fast.decode, grid, &params),
        }
    }

    /// Token by token, any shape.
    fn kda_recurrent(&self, params: &KdaParams, rows: Section) -> Result<()> {
        let params = KdaParams { rows: rows.address, ..*params };
        let grid = Grid::new(rows.count, params.heads as usize, params.head_dim.next_multiple_of(32));
        self.stream.launch(&self.kernels.kda_recurrent, grid, &params)
    }
}

fn check(shape: &KdaShape, weights: &KdaWeights<'_>) -> Result<()> {
    let (dim, hidden) = (shape.head_dim, shape.hidden);
    let channels = shape.heads * dim;
    if dim == 0 || dim > MOST_CHANNELS || shape.conv == 0 {
        return Err(BackendError::Unsupported(format!(
            "a KDA head of {dim} channels with {} taps; up to {MOST_CHANNELS} channels and at least one tap",
            shape.conv
        )));
    }
    for (projection, conv) in weights.qkv_proj.iter().zip(&weights.qkv_conv) {
        projection.expect(&[channels, hidden])?;
        conv.expect(&[channels, shape.conv])?;
    }
    weights.f_a_proj.expect(&[dim, hidden])?;
    weights.f_b_proj.expect(&[channels, dim])?;
    weights.dt_bias.expect(&[channels])?;
    weights.a_log.expect(&[shape.heads])?;
    weights.b_proj.expect(&[shape.heads, hidden])?;
    weights.g_a_proj.expect(&[dim, hidden])?;
    weights.g_b_proj.expect(&[channels, dim])?;
    weights.o_norm.expect(&[dim])?;
    weights.o_proj.expect(&[hidden, channels])
}
