//! Attention in the expanded form, for the rows of a step that have many tokens: keys and values of the context are formed from
//! its latents stretch by stretch, and the queries attend to them as plain heads. Such a row's queries, [heads (n + r)] in the
//! activation type, lie at the start of its row of the queries' tensor; its results, [heads m], in the second half of its row of
//! the partial outputs' tensor, the first half of which holds what the stretches so far gave.

use perigee_backend::{DType, MlaShape, Partials, Result};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::expand::{Span, Stretch};
use crate::needs;
use crate::ops::mla::Mla;
use crate::params::{ExpandedItem, GatherRun, MlaExpandedParams, MlaGatherParams, MlaStoreParams};
use crate::stream::Grid;
use crate::tensor::Tensor;
use crate::tensor_map::{Rows, TensorMap};

/// Working memory of a stretch, by address.
struct Place {
    latents: u64,
    expanded: u64,
}

impl CudaBackend {
    /// Queries of a span in the expanded form, and its latents to their pages.
    pub(crate) fn mla_project_expanded(
        &mut self,
        layer: &Mla,
        index: usize,
        x: &Tensor,
        queries: &Tensor,
        span: Span,
    ) -> Result<()> {
        let shape = layer.shape;
        let pitch = query_pitch(&shape);
        let out = queries.address() + (span.first * pitch * 2) as u64;
        let product = Product {
            out_pitch: pitch,
            ..Product::dense(span.tokens, shape.hidden, layer.projection.rows, DType::Bf16)
        };
        let input = x.address() + (span.first * shape.hidden * 2) as u64;
        self.blas.run(&self.stream, &product, Operands { input, weight: layer.projection.address(), out })?;
        let params = MlaStoreParams {
            projected: out,
            places: self.step.places.address + (span.first * 4) as u64,
            pitch: pitch as u32,
            // The queries stay as they are.
            heads: 0,
            queries: 0,
            query_source: out,
            query_pitch: pitch as u32,
            ..self.mla_store_params(layer, index)?
        };
        self.stream.launch(&self.kernels.mla_store, Grid::new(span.tokens, 1, 256), &params)
    }

    /// Attention of all spans in the expanded form.
    pub(crate) fn mla_attend_expanded(
        &mut self,
        layer: &Mla,
        latents: u64,
        queries: &Tensor,
        partials: &Partials<Tensor>,
        scale: f32,
    ) -> Result<()> {
        let shape = layer.shape;
        // Whoever used working memory before is ahead in the stream.
        self.scratch.reset();
        let keys = needs::stretch_keys(self.most_rows);
        let place = Place {
            latents: self.scratch.take(keys * shape.cache_width() * 2)?,
            expanded: self.scratch.take(keys * shape.heads * (shape.nope + shape.value) * 2)?,
        };
        let matrix =
            |address, columns, rows, pitch| TensorMap::new(Rows { address, columns, rows, pitch, box_rows: 128 });
        let width = shape.heads * (shape.nope + shape.rope);
        let query_map = matrix(queries.address(), width, self.tokens(), query_pitch(&shape))?;
        for at in 0..self.step.expansion.stretches.len() {
            let stretch = self.step.expansion.stretches[at];
            self.mla_expand(layer, latents, stretch, &place)?;
            let columns = shape.heads * (shape.nope + shape.value);
            let params = MlaExpandedParams {
                queries: query_map,
                expanded: matrix(place.expanded, columns, stretch.keys, columns)?,
                latents: matrix(place.latents, shape.cache_width(), stretch.keys, shape.cache_width())?,
                output: partials.output.address(),
                lse: partials.lse.address(),
                values: values_address(partials, &shape, 0),
                items: self.step.expanded_items.address + (stretch.first_item * size_of::<ExpandedItem>()) as u64,
                heads: shape.heads as u32,
                value_pitch: value_pitch(&shape) as u32,
                scale,
                reserved: [0; 5],
            };
            let kernel = &self.kernels.mla_expanded;
            let Some(kernel) = kernel else { return Ok(()) };
            let grid = Grid::new(stretch.items, shape.heads, 384).shared(kernel.shared);
            self.stream.launch(&kernel.attend, grid, &params)?;
        }
        Ok(())
    }

    /// Keys and values of a stretch: [keys, R] . [heads (n + m), R] transposed.
    fn mla_expand(&mut self, layer: &Mla, latents: u64, stretch: Stretch, place: &Place) -> Result<()> {
        let shape = layer.shape;
        let params = MlaGatherParams {
            latents,
            out: place.latents,
            runs: self.step.gather_runs.address + (stretch.first_run * size_of::<GatherRun>()) as u64,
            pieces: (shape.cache_width() * 2 / 16) as u32,
            reserved: 0,
        };
        if let Some(kernel) = &self.kernels.mla_expanded {
            self.stream.launch(&kernel.gather, Grid::new(stretch.runs, 1, 256), &params)?;
        }
        let columns = shape.heads * (shape.nope + shape.value);
        let product = Product {
            input_pitch: shape.cache_width(),
            ..Product::dense(stretch.keys, shape.latent, columns, DType::Bf16)
        };
        let operands = Operands { input: place.latents, weight: layer.kv_b.address(), out: place.expanded };
        self.blas.run(&self.stream, &product, operands)
    }
}

/// Elements from one token's queries to the next in the expanded form.
fn query_pitch(shape: &MlaShape) -> usize {
    2 * shape.heads * shape.cache_width()
}

/// Elements from one token's values to the next.
pub(crate) fn value_pitch(shape: &MlaShape) -> usize {
    2 * shape.heads * shape.latent
}

/// Device address of a token's values.
pub(crate) fn values_address(partials: &Partials<Tensor>, shape: &MlaShape, token: usize) -> u64 {
    partials.output.address() + (2 * token * value_pitch(shape) + shape.heads * shape.latent * 2) as u64
}
