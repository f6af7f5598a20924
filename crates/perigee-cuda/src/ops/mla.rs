//! The MLA mixer in its three thirds: projections and the latent store, attention over paged latents, values and the output
//! projection; and the merge of parts computed elsewhere.

use perigee_backend::weights::{MlaWeights, QueryWeights};
use perigee_backend::{BackendError, DType, MlaShape, OtherPart, Partials, Result};

use crate::backend::CudaBackend;
use crate::blas::{Operands, Product};
use crate::expand::Span;
use crate::formula::Fault;
use crate::kernels::MlaFew;
use crate::loader::{Loader, Placement};
use crate::needs;
use crate::ops::attention::{Dealt, Launch};
use crate::ops::expanded::{value_pitch, values_address};
use crate::ops::norm::{Norm, NormRows};
use crate::params::{ElementParams, MlaAbsorbParams, MlaAttendParams, MlaMergeParams, MlaStoreParams, MlaValuesParams};
use crate::stream::Grid;
use crate::tensor::{Matrix, Tensor};

/// Most numbers of a cached token, R + r.
const MOST_WIDTH: usize = 768;
/// Numbers of a thread that converts.
const CONVERTED: usize = 8;

/// The low-rank query's second half.
#[derive(Debug)]
struct LowRank {
    norm: Norm,
    /// [heads (n + r), rank]
    up: Matrix,
}

/// An MLA layer's mixer.
#[derive(Debug)]
pub struct Mla {
    pub(crate) shape: MlaShape,
    /// Rows, padded to 8: the query (or its low-rank down projection), then the latent R and the shared key r.
    pub(crate) projection: Matrix,
    /// First row of the latent in `projection`.
    kv_offset: usize,
    low_rank: Option<LowRank>,
    norm: Norm,
    /// [heads (n + m), R]: per head n key rows, then m value rows.
    pub(crate) kv_b: Matrix,
    /// [d, heads m]
    output: Matrix,
}

impl Mla {
    fn query_width(&self) -> usize {
        self.shape.heads * (self.shape.nope + self.shape.rope)
    }
}

impl CudaBackend {
    pub(crate) fn mla_load(&mut self, shape: &MlaShape, weights: &MlaWeights<'_>) -> Result<Mla> {
        check(shape, weights)?;
        if *self.mla_heads.get_or_insert(shape.heads) != shape.heads {
            return Err(BackendError::Unsupported(format!("MLA layers with different head counts, {}", shape.heads)));
        }
        let expands = self.kernels.mla_expanded.is_some() && needs::expands(shape);
        self.mla_expands = Some(expands && self.mla_expands != Some(false));
        let first = match &weights.query {
            QueryWeights::Full(weight) => weight,
            QueryWeights::LowRank { down, .. } => down,
        };
        let (kv_offset, width) = needs::mla_rows(shape);
        let projection = Loader::matrix(&self.stream, width, shape.hidden, self.precision, &first.name)?;
        self.loader.place(&self.stream, &self.kernels, first, &projection, Placement::at(0))?;
        let kv_rows = Placement::at(kv_offset);
        self.loader.place(&self.stream, &self.kernels, &weights.kv_a_proj, &projection, kv_rows)?;
        let low_rank = match &weights.query {
            QueryWeights::Full(_) => None,
            QueryWeights::LowRank { norm, up, .. } => {
                Some(LowRank { norm: self.norm_load(norm, shape.eps)?, up: self.load_matrix(up)? })
            }
        };
        for need in needs::mla(shape, self.precision.bytes()) {
            self.scratch.require(need);
        }
        Ok(Mla {
            shape: *shape,
            projection,
            kv_offset,
            low_rank,
            norm: self.norm_load(&weights.kv_a_norm, shape.eps)?,
            kv_b: self.load_matrix(&weights.kv_b_proj)?,
            output: self.load_matrix(&weights.o_proj)?,
        })
    }

    pub(crate) fn mla_project_run(&mut self, layer: &Mla, index: usize, x: &Tensor, queries: &Tensor) -> Result<()> {
        let (tokens, shape) = (self.tokens(), layer.shape);
        x.expect("mla_project input", tokens, shape.hidden, self.precision)?;
        queries.expect("absorbed queries", tokens, shape.heads * shape.cache_width(), DType::Fp32)?;
        let spans = self.mla_spans();
        for span in spans {
            if span.is_expanded {
                self.settle_norm()?;
                self.mla_project_expanded(layer, index, x, queries, span)?;
            } else {
                self.mla_project_absorbed(layer, index, x, queries, span)?;
            }
        }
        Ok(())
    }

    /// The step's tokens by the form in which they attend: in most steps all of them are absorbed.
    fn mla_spans(&self) -> Vec<Span> {
        let spans = &self.step.expansion.spans;
        if spans.is_empty() {
            return vec![Span { first: 0, tokens: self.tokens(), is_expanded: false }];
        }
        spans.clone()
    }

    fn mla_project_absorbed(
        &mut self,
        layer: &Mla,
        index: usize,
        x: &Tensor,
        queries: &Tensor,
        span: Span,
    ) -> Result<()> {
        let (tokens, shape, element) = (span.tokens, layer.shape, self.precision.bytes());
        let width = layer.projection.rows;
        self.scratch.reset();
        let projected = self.scratch.take(tokens * width * element)?;
        let product = Product::dense(tokens, shape.hidden, width, self.precision);
        let input = x.address() + (span.first * shape.hidden * element) as u64;
        let operands = Operands { input, weight: layer.projection.address(), out: projected };
        self.dense_after_norm(&product, operands)?;
        let (query, query_pitch) = self.mla_queries(layer, projected, tokens)?;

        let out = queries.address() + (span.first * shape.heads * shape.cache_width() * 4) as u64;
        let params = MlaStoreParams {
            projected,
            queries: out,
            places: self.step.places.address + (span.first * 4) as u64,
            pitch: width as u32,
            query_pitch: query_pitch as u32,
            query_source: query,
            ..self.mla_store_params(layer, index)?
        };
        if let Some(kernels) = self.mla_few(&shape, tokens) {
            let params =
                MlaAbsorbParams { store: params, weight: layer.kv_b.address(), value: shape.value as u32, reserved: 0 };
            let mut grid = Grid::new(shape.heads + 1, shape.latent / MlaFew::COLUMNS, 256);
            grid.blocks.2 = tokens as u32;
            return self.stream.launch(&kernels.absorb, grid, &params);
        }

        // Keys of a head absorbed into its query: [tokens, n] . [n, R].
        let kv_rows = shape.nope + shape.value;
        let product = Product {
            transposed: false,
            input_pitch: query_pitch,
            weight_pitch: shape.latent,
            out_pitch: shape.heads * shape.cache_width(),
            batch: shape.heads,
            input_stride: shape.nope + shape.rope,
            weight_stride: kv_rows * shape.latent,
            out_stride: shape.cache_width(),
            result: DType::Fp32,
            ..Product::dense(tokens, shape.nope, shape.latent, self.precision)
        };
        self.dense(&product, Operands { input: query, weight: layer.kv_b.address(), out })?;
        self.stream.launch(&self.kernels.mla_store, Grid::new(tokens, 1, 256), &params)
    }

    /// The kernels for the products with the latent's weights, where the tokens are few.
    fn mla_few(&self, shape: &MlaShape, tokens: usize) -> Option<&MlaFew> {
        let fits = tokens <= MlaFew::TOKENS
            && shape.nope <= MlaFew::NOPE
            && shape.latent <= MlaFew::LATENT
            && shape.latent.is_multiple_of(MlaFew::COLUMNS)
            && !self.formula.has(Fault::Rotary);
        self.kernels.mla_few.as_ref().filter(|_| fits)
    }

    /// The latent store of a layer, without what it stores.
    pub(crate) fn mla_store_params(&self, layer: &Mla, index: usize) -> Result<MlaStoreParams> {
        let shape = layer.shape;
        Ok(MlaStoreParams {
            projected: 0,
            norm: layer.norm.weight.address(),
            latents: self.mla_latents(layer, index)?,
            queries: 0,
            places: 0,
            pitch: 0,
            kv_offset: layer.kv_offset as u32,
            heads: shape.heads as u32,
            nope: shape.nope as u32,
            rope: shape.rope as u32,
            latent: shape.latent as u32,
            eps: layer.norm.eps,
            query_pitch: 0,
            query_source: 0,
        })
    }

    /// Where the queries lie, [tokens, heads (n + r)], and their pitch.
    fn mla_queries(&mut self, layer: &Mla, projected: u64, tokens: usize) -> Result<(u64, usize)> {
        let width = layer.projection.rows;
        let Some(low_rank) = &layer.low_rank else { return Ok((projected, width)) };
        let element = self.precision.bytes();
        let rank = low_rank.norm.width;
        let pitch = rank.next_multiple_of(8);
        let normed = self.scratch.take(tokens * pitch * element)?;
        let queries = self.scratch.take(tokens * layer.query_width() * element)?;
        let rows = NormRows {
            rows: tokens,
            residual: projected,
            residual_pitch: width,
            delta: 0,
            sum: projected,
            out: normed,
            out_pitch: pitch,
        };
        self.norm_rows(&low_rank.norm, &rows)?;
        let product =
            Product { input_pitch: pitch, ..Product::dense(tokens, rank, layer.query_width(), self.precision) };
        let operands = Operands { input: normed, weight: low_rank.up.address(), out: queries };
        self.dense(&product, operands)?;
        Ok((queries, layer.query_width()))
    }

    fn mla_latents(&self, layer: &Mla, index: usize) -> Result<u64> {
        let cache = self.cache()?;
        if cache.shape().latent_width != layer.shape.cache_width() {
            let expected = [layer.shape.cache_width()];
            return Err(BackendError::shape("latent pages (R + r)", &expected, &[cache.shape().latent_width]));
        }
        if index >= cache.shape().mla_layers {
            let limit = cache.shape().mla_layers as u64;
            return Err(BackendError::Range { what: "MLA layer", index: index as u64, limit });
        }
        cache.latents(index)
    }

    /// Rows of a partial result of attention.
    fn mla_part_rows(&self) -> usize {
        needs::part_rows(self.mla_heads.unwrap_or(0))
    }

    /// Bytes of the current step's partial results.
    pub(crate) fn mla_part_bytes(&self, latent: usize) -> usize {
        needs::parts(self.step.parts, self.mla_heads.unwrap_or(0), latent)
    }

    pub(crate) fn mla_attend_run(
        &mut self,
        layer: &Mla,
        index: usize,
        queries: &Tensor,
        partials: &Partials<Tensor>,
    ) -> Result<()> {
        let (tokens, shape) = (self.tokens(), layer.shape);
        queries.expect("absorbed queries", tokens, shape.heads * shape.cache_width(), DType::Fp32)?;
        expect_partials(partials, tokens, &shape)?;
        let part_rows = self.mla_part_rows();
        self.scratch.reset();
        let part_output = self.scratch.take(self.step.parts * part_rows * shape.latent * 4)?;
        let part_lse = self.scratch.take(self.step.parts * part_rows * 4)?;
        let params = MlaAttendParams {
            queries: queries.address(),
            latents: self.mla_latents(layer, index)?,
            output: partials.output.address(),
            lse: partials.lse.address(),
            part_output,
            part_lse,
            items: self.step.items.address,
            ranges: self.step.ranges.address,
            pages: self.step.pages.address,
            merges: self.step.merges.address,
            heads: shape.heads as u32,
            latent: shape.latent as u32,
            rope: shape.rope as u32,
            part_rows: part_rows as u32,
            scale: if self.formula.has(Fault::ScaleWithoutRope) {
                1.0 / (shape.nope as f32).sqrt()
            } else {
                shape.scale()
            },
            reserved: 0,
        };
        let (first_items, blocks) = (self.step.first_items, self.step.first_items.count.saturating_sub(1));
        let dealt = Dealt { first_items: first_items.address, blocks, pages: self.cache()?.shape().pages };
        let plan = Launch {
            items: self.step.items.count,
            merges: self.step.merges.count,
            item_tokens: self.step.item_tokens,
            dealt: Some(dealt).filter(|dealt| dealt.blocks > 0),
        };
        self.kernels.mla_attention.launch(&self.stream, &params, &plan)?;
        if self.step.expansion.stretches.is_empty() {
            return Ok(());
        }
        self.mla_attend_expanded(layer, params.latents, queries, partials, params.scale)
    }

    pub(crate) fn mla_merge_run(
        &mut self,
        layer: &Mla,
        partials: &Partials<Tensor>,
        parts: &[OtherPart<'_>],
    ) -> Result<()> {
        let shape = layer.shape;
        let width = shape.heads * shape.latent;
        for &OtherPart { token, output, lse } in parts {
            expect_partials(partials, token + 1, &shape)?;
            if self.step.expansion.holds(token) {
                let what = format!("token {token} has all its keys here: there is nothing to merge");
                return Err(BackendError::Batch(what));
            }
            if output.len() != width || lse.len() != shape.heads {
                return Err(BackendError::shape("part to merge", &[width, shape.heads], &[output.len(), lse.len()]));
            }
        }
        // As many at a time as working memory holds; it has room for one.
        let part_bytes = (width + shape.heads) * 4;
        for parts in parts.chunks((self.scratch.bytes() / part_bytes).max(1)) {
            self.scratch.reset();
            let values: Vec<f32> = parts.iter().flat_map(|part| [part.output, part.lse]).flatten().copied().collect();
            let others = self.scratch.send(&self.stream, bytemuck::cast_slice(&values))?;
            for (other, part) in (others..).step_by(part_bytes).zip(parts) {
                let params = MlaMergeParams {
                    output: partials.output.address() + (part.token * width * 4) as u64,
                    lse: partials.lse.address() + (part.token * shape.heads * 4) as u64,
                    other_output: other,
                    other_lse: other + (width * 4) as u64,
                    latent: shape.latent as u32,
                    reserved: 0,
                };
                self.stream.launch(&self.kernels.mla_merge_other, Grid::new(shape.heads, 1, 128), &params)?;
            }
        }
        Ok(())
    }

    pub(crate) fn mla_output_run(&mut self, layer: &Mla, partials: &Partials<Tensor>, out: &Tensor) -> Result<()> {
        let (tokens, shape, element) = (self.tokens(), layer.shape, self.precision.bytes());
        expect_partials(partials, tokens, &shape)?;
        out.expect("mla_output", tokens, shape.hidden, self.precision)?;
        let width = shape.heads * shape.value;
        self.scratch.reset();
        let (values, pitch) = if self.step.expansion.spans.is_empty() {
            let values = self.scratch.take(tokens * width * element)?;
            self.mla_values(layer, partials, (0, tokens), (values, width))?;
            (values, width)
        } else {
            // Where the expanded form left its own.
            let pitch = value_pitch(&shape);
            for span in self.step.expansion.spans.clone().iter().filter(|span| !span.is_expanded) {
                self.scratch.reset();
                let place = values_address(partials, &shape, span.first);
                self.mla_values(layer, partials, (span.first, span.tokens), (place, pitch))?;
            }
            (values_address(partials, &shape, 0), pitch)
        };
        let product = Product { input_pitch: pitch, ..Product::dense(tokens, width, shape.hidden, self.precision) };
        let operands = Operands { input: values, weight: layer.output.address(), out: out.address() };
        self.dense(&product, operands)
    }

    /// Values of a head out of its latent average, [tokens, R] . [m, R] transposed, for some tokens, given by their first and
    /// number, to an address with a pitch.
    fn mla_values(
        &mut self,
        layer: &Mla,
        partials: &Partials<Tensor>,
        (first, tokens): (usize, usize),
        (values, pitch): (u64, usize),
    ) -> Result<()> {
        let (shape, element) = (layer.shape, self.precision.bytes());
        let count = tokens * shape.heads * shape.latent;
        let is_dense = pitch == shape.heads * shape.value;
        let input = partials.output.address() + (first * shape.heads * shape.latent * 4) as u64;
        if let Some(kernels) = self.mla_few(&shape, tokens).filter(|_| is_dense) {
            let params = MlaValuesParams {
                latents: input,
                weight: layer.kv_b.address(),
                out: values,
                heads: shape.heads as u32,
                nope: shape.nope as u32,
                value: shape.value as u32,
                latent: shape.latent as u32,
            };
            let mut grid = Grid::new(shape.heads, shape.value.div_ceil(MlaFew::VALUES), 256);
            grid.blocks.2 = tokens as u32;
            return self.stream.launch(&kernels.values, grid, &params);
        }
        let latent = match self.precision {
            DType::Fp32 => input,
            DType::Bf16 => {
                let narrow = self.scratch.take(count * element)?;
                let params = ElementParams { input, out: narrow, count: count as u64, width: 0, block: 0 };
                let grid = Grid::new(count.div_ceil(256 * CONVERTED).min(1 << 16), 1, 256);
                self.stream.launch(&self.kernels.convert_bf16, grid, &params)?;
                narrow
            }
        };
        let product = Product {
            input_pitch: shape.heads * shape.latent,
            out_pitch: pitch,
            batch: shape.heads,
            input_stride: shape.latent,
            weight_stride: (shape.nope + shape.value) * shape.latent,
            out_stride: shape.value,
            ..Product::dense(tokens, shape.latent, shape.value, self.precision)
        };
        let operands = Operands { input: latent, weight: layer.kv_b.row(shape.nope), out: values };
        self.dense(&product, operands)
    }
}

fn expect_partials(partials: &Partials<Tensor>, rows: usize, shape: &MlaShape) -> Result<()> {
    partials.output.expect("partial outputs", rows, shape.heads * shape.latent, DType::Fp32)?;
    partials.lse.expect("partial log-sum-exps", rows, shape.heads, DType::Fp32)
}

fn check(shape: &MlaShape, weights: &MlaWeights<'_>) -> Result<()> {
    if shape.cache_width() > MOST_WIDTH {
        return Err(BackendError::Unsupported(format!(
            "an MLA layer that caches {} + {} numbers a token; up to {MOST_WIDTH}",
            shape.latent, shape.rope
        )));
    }
    let query_width = shape.heads * (shape.nope + shape.rope);
    if shape.query_rank.is_some() != matches!(weights.query, QueryWeights::LowRank { .. }) {
        return Err(BackendError::Shape {
            what: "query projection of an MLA layer".into(),
            expected: format!("rank {:?}", shape.query_rank),
            found: "the other form".into(),
        });
    }
    match &weights.query {
        QueryWeights::Full(weight) => weight.expect(&[query_width, shape.hidden])?,
        QueryWeights::LowRank { down, norm, up } => {
            let rank = shape.query_rank.unwrap_or(0);
            down.expect(&[rank, shape.hidden])?;
            norm.expect(&[rank])?;
            up.expect(&[query_width, rank])?;
        }
    }
    weights.kv_a_proj.expect(&[shape.cache_width(), shape.hidden])?;
    weights.kv_a_norm.expect(&[shape.latent])?;
    weights.kv_b_proj.expect(&[shape.heads * (shape.nope + shape.value), shape.latent])?;
    weights.o_proj.expect(&[shape.hidden, shape.heads * shape.value])
}
