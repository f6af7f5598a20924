//! The MLA mixer without positional encoding, in thirds: project (queries absorbed into latent space, latents cached),
//! attend (over latents, per segment, merged by log-sum-exp), output (values out of latent space). Between the first and
//! the last, parts computed elsewhere may be merged in.

use perigee_backend::weights::{MlaWeights, QueryWeights};
use perigee_backend::{BackendError, MlaShape, Result, Row};

use crate::formula::{Fault, Formula};
use crate::latents::{LatentSlab, Queries, attend_segment, merge};
use crate::matrix::{Matrix, load_vector};
use crate::ops::norm::rms_norm_in_place;
use crate::tensor::round_bf16;
use crate::workers::Workers;

/// Query positions attended by one task.
const TILE_POSITIONS: usize = 16;

#[derive(Debug)]
enum Query {
    Full(Matrix),
    LowRank { down: Matrix, norm: Vec<f32>, up: Matrix },
}

/// Weights of an MLA mixer on this rank.
#[derive(Debug)]
pub struct Mla {
    pub(crate) shape: MlaShape,
    query: Query,
    kv_a: Matrix,
    kv_a_norm: Vec<f32>,
    /// [heads (n + m), R].
    kv_b: Matrix,
    o: Matrix,
    formula: Formula,
}

impl Mla {
    pub(crate) fn load(shape: &MlaShape, weights: &MlaWeights<'_>, formula: Formula) -> Result<Self> {
        let MlaShape { hidden, heads, nope, rope, value, latent, .. } = *shape;
        let query = match (&weights.query, shape.query_rank) {
            (QueryWeights::Full(proj), None) => Query::Full(Matrix::load(proj, heads * (nope + rope), hidden)?),
            (QueryWeights::LowRank { down, norm, up }, Some(rank)) => Query::LowRank {
                down: Matrix::load(down, rank, hidden)?,
                norm: load_vector(norm, rank)?,
                up: Matrix::load(up, heads * (nope + rope), rank)?,
            },
            (QueryWeights::Full(proj), Some(rank)) => {
                return Err(BackendError::shape("query projection", &[rank, hidden], &proj.shape));
            }
            (QueryWeights::LowRank { down, .. }, None) => {
                return Err(BackendError::shape("query projection", &[heads * (nope + rope), hidden], &down.shape));
            }
        };
        Ok(Self {
            shape: *shape,
            query,
            kv_a: Matrix::load(&weights.kv_a_proj, latent + rope, hidden)?,
            kv_a_norm: load_vector(&weights.kv_a_norm, latent)?,
            kv_b: Matrix::load(&weights.kv_b_proj, heads * (nope + value), latent)?,
            o: Matrix::load(&weights.o_proj, hidden, heads * value)?,
            formula,
        })
    }

    /// The latents of `x` [tokens, d]: normed latent and shared key, [tokens, R + r].
    pub(crate) fn latents(&self, workers: &Workers, x: &[f32], rounded: bool) -> Vec<f32> {
        let MlaShape { hidden, latent, eps, .. } = self.shape;
        let mut latents = vec![0f32; x.len() / hidden * self.kv_a.rows()];
        self.kv_a.product(workers, x, &mut latents);
        if rounded {
            round_bf16(&mut latents);
        }
        for row in latents.chunks_exact_mut(self.kv_a.rows()) {
            rms_norm_in_place(&mut row[..latent], &self.kv_a_norm, eps);
        }
        latents
    }

    /// Absorbed queries [tokens, heads, R + r] of `x` [tokens, d]: q_nope Wuk, then q_rope as it is.
    pub(crate) fn queries(&self, workers: &Workers, x: &[f32], rounded: bool, out: &mut [f32]) {
        let MlaShape { hidden, heads, nope, rope, value, latent, eps, .. } = self.shape;
        let tokens = x.len() / hidden;
        let product = |matrix: &Matrix, x: &[f32]| {
            let mut out = vec![0f32; tokens * matrix.rows()];
            matrix.product(workers, x, &mut out);
            if rounded {
                round_bf16(&mut out);
            }
            out
        };
        let plain = match &self.query {
            Query::Full(proj) => product(proj, x),
            Query::LowRank { down, norm, up } => {
                let mut low = product(down, x);
                low.chunks_exact_mut(down.rows()).for_each(|row| rms_norm_in_place(row, norm, eps));
                if rounded {
                    round_bf16(&mut low);
                }
                product(up, &low)
            }
        };
        let (from, to) = (heads * (nope + rope), heads * (latent + rope));
        for head in 0..heads {
            let (source, target) = (head * (nope + rope), head * (latent + rope));
            self.kv_b.product_transposed(head * (nope + value), nope, &plain[source..], from, &mut out[target..], to);
            for (plain, out) in plain.chunks_exact(from).zip(out.chunks_exact_mut(to)) {
                out[target + latent..target + latent + rope]
                    .copy_from_slice(&plain[source + nope..source + nope + rope]);
            }
        }
    }

    /// Attention of every row's queries over its local segments, into `output` [tokens, heads * R] and `lse`
    /// [tokens, heads].
    pub(crate) fn attend(
        &self,
        workers: &Workers,
        cache: (&LatentSlab, usize),
        rows: &[Row],
        queries: &[f32],
        (output, lse): (&mut [f32], &mut [f32]),
    ) -> Result<()> {
        let MlaShape { heads, nope, latent, .. } = self.shape;
        let width = heads * self.shape.cache_width();
        let scale =
            if self.formula.has(Fault::ScaleWithoutRope) { 1.0 / (nope as f32).sqrt() } else { self.shape.scale() };
        let mut tasks = Vec::new();
        let mut token = 0;
        for row in rows {
            let count = row.tokens as usize;
            for tile in (0..count).step_by(TILE_POSITIONS) {
                tasks.push((row, token + tile, row.position + tile as u64, TILE_POSITIONS.min(count - tile)));
            }
            token += count;
        }
        let results = workers.map(tasks, |(row, token, position, count)| {
            let queries =
                Queries { values: &queries[token * width..(token + count) * width], heads, position, scale, latent };
            let mut output = vec![0f32; count * heads * latent];
            let mut lse = vec![f32::NEG_INFINITY; count * heads];
            for segment in &row.segments {
                let part = attend_segment(cache.0, cache.1, segment, &queries)?;
                merge(&mut output, &mut lse, &part.output, &part.lse);
            }
            Ok((token, output, lse))
        });
        for result in results {
            let (token, part, part_lse) = result?;
            output[token * heads * latent..][..part.len()].copy_from_slice(&part);
            lse[token * heads..][..part_lse.len()].copy_from_slice(&part_lse);
        }
        Ok(())
    }

    /// Outputs in latent space [tokens, heads, R] to this rank's partial sum of the output projection, [tokens, d].
    pub(crate) fn output(&self, workers: &Workers, mixed: &[f32], rounded: bool, out: &mut [f32]) {
        let MlaShape { heads, nope, value, latent, .. } = self.shape;
        let tokens = mixed.len() / (heads * latent);
        let mut values = vec![0f32; tokens * heads * value];
        for head in 0..heads {
            self.kv_b.product_rows(
                head * (nope + value) + nope,
                value,
                &mixed[head * latent..],
                heads * latent,
                &mut values[head * value..],
                heads * value,
            );
        }
        if rounded {
            round_bf16(&mut values);
        }
        self.o.product(workers, &values, out);
    }
}
