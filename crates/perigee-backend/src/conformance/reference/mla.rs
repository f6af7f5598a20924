//! The MLA mixer as plain attention: keys and values expanded from the latents, one softmax over all positions. The
//! latent-space quantities that cross the seam (absorbed queries, partials) are formed separately, from their definitions.

use std::ops::Range;

use crate::shapes::MlaShape;
use crate::weights::{MlaWeights, QueryWeights};

use super::super::draw::{Origin, Weight, WeightDraw, dot};
use super::rms_norm;
use crate::weights::DType;

/// An MLA layer, drawn.
pub(crate) struct MlaLayer {
    pub(crate) shape: MlaShape,
    /// q_a_proj and its norm, where the query has a rank.
    query_down: Option<[Weight; 2]>,
    /// q_proj or q_b_proj.
    query_up: Weight,
    kv_a_proj: Weight,
    kv_a_norm: Weight,
    kv_b_proj: Weight,
    o_proj: Weight,
}

/// Attention over some of the positions, in latent space.
pub(crate) struct Part {
    /// [heads, R]; zero where the part is empty.
    pub(crate) output: Vec<f64>,
    /// [heads]; -inf where the part is empty.
    pub(crate) lse: Vec<f64>,
}

/// One sequence with everything that the layer makes of it.
pub(crate) struct Sequence {
    /// Inputs [T, d].
    pub(crate) x: Vec<f64>,
    /// What is cached: T times [R + r].
    pub(crate) latents: Vec<Vec<f64>>,
    /// Absorbed queries: T times [heads (R + r)].
    pub(crate) absorbed: Vec<Vec<f64>>,
    /// Outputs of plain causal attention: T times [d].
    pub(crate) mixed: Vec<Vec<f64>>,
}

impl MlaLayer {
    /// Draws a layer; scores have a deviation of about 2, so that attention is neither flat nor single-minded.
    pub(crate) fn draw(shape: MlaShape, seed: u64, origin: Origin) -> Self {
        let (d, latent, heads) = (shape.hidden, shape.latent, shape.heads);
        let wide = heads * (shape.nope + shape.rope);
        let unit = |width: usize| (width as f64).powf(-0.5);
        let mut w = WeightDraw::new(seed, origin);
        let (query_down, query_up) = match shape.query_rank {
            None => (None, w.normal("q_proj", &[wide, d], 2.0 * unit(d))),
            Some(rank) => {
                let down = w.normal("q_a_proj", &[rank, d], unit(d));
                let norm = w.uniform("q_a_layernorm", &[rank], DType::Bf16, [0.5, 1.5]);
                (Some([down, norm]), w.normal("q_b_proj", &[wide, rank], 2.0 * unit(rank)))
            }
        };
        Self {
            shape,
            query_down,
            query_up,
            kv_a_proj: w.normal("kv_a_proj_with_mqa", &[latent + shape.rope, d], unit(d)),
            kv_a_norm: w.uniform("kv_a_layernorm", &[latent], DType::Bf16, [0.5, 1.5]),
            kv_b_proj: w.normal("kv_b_proj", &[heads * (shape.nope + shape.value), latent], unit(latent)),
            o_proj: w.normal("o_proj", &[d, heads * shape.value], unit(heads * shape.value)),
        }
    }

    /// Adds a constant to all scores of a layer without a query rank: input channel 0, which the caller keeps at 1, feeds only one shared key channel (8)
    /// and the query channel that meets it. Returns the constant, which is about `offset`.
    pub(crate) fn offset_scores(&mut self, offset: f64) -> f64 {
        let d = self.shape.hidden;
        let row = self.shape.latent * d;
        self.kv_a_proj = self.kv_a_proj.edited(|weight| {
            weight[row..row + d].fill(0.0);
            weight[row] = 8.0;
        });
        let head_rows = self.shape.nope + self.shape.rope;
        let strength = super::super::draw::round(offset / (8.0 * self.scale()), DType::Bf16);
        self.query_up = self.query_up.edited(|weight| {
            for head in weight.chunks_exact_mut(head_rows * d) {
                let row = &mut head[self.shape.nope * d..(self.shape.nope + 1) * d];
                row.fill(0.0);
                row[0] = strength;
            }
        });
        strength * 8.0 * self.scale()
    }

    /// The layer's tensors as a backend loads them.
    pub(crate) fn weights(&self) -> MlaWeights<'_> {
        MlaWeights {
            query: match &self.query_down {
                None => QueryWeights::Full(self.query_up.slice()),
                Some([down, norm]) => {
                    QueryWeights::LowRank { down: down.slice(), norm: norm.slice(), up: self.query_up.slice() }
                }
            },
            kv_a_proj: self.kv_a_proj.slice(),
            kv_a_norm: self.kv_a_norm.slice(),
            kv_b_proj: self.kv_b_proj.slice(),
            o_proj: self.o_proj.slice(),
        }
    }

    fn scale(&self) -> f64 {
        ((self.shape.nope + self.shape.rope) as f64).powf(-0.5)
    }

    fn eps(&self) -> f64 {
        f64::from(self.shape.eps)
    }

    /// (c, kr) of one token.
    fn latent(&self, x: &[f64]) -> Vec<f64> {
        let down = self.kv_a_proj.apply(x);
        let (latent, key) = down.split_at(self.shape.latent);
        let mut cached = rms_norm(latent, &self.kv_a_norm.values, self.eps());
        cached.extend_from_slice(key);
        cached
    }

    /// q of one token, [heads, n + r].
    fn queries(&self, x: &[f64]) -> Vec<f64> {
        match &self.query_down {
            None => self.query_up.apply(x),
            Some([down, norm]) => self.query_up.apply(&rms_norm(&down.apply(x), &norm.values, self.eps())),
        }
    }

    /// Row `row` of head `head` of kv_b_proj: the first n are keys, the next m values.
    fn expansion(&self, head: usize, row: usize) -> &[f64] {
        let start = (head * (self.shape.nope + self.shape.value) + row) * self.shape.latent;
        &self.kv_b_proj.values[start..start + self.shape.latent]
    }

    /// [heads, R + r]: qn Wuk, then qr.
    fn absorb(&self, queries: &[f64]) -> Vec<f64> {
        let head_width = self.shape.nope + self.shape.rope;
        let mut absorbed = Vec::with_capacity(self.shape.heads * self.shape.cache_width());
        for (head, query) in queries.chunks_exact(head_width).enumerate() {
            let (plain, shared) = query.split_at(self.shape.nope);
            let mut sum = vec![0.0; self.shape.latent];
            for (row, q) in plain.iter().enumerate() {
                sum.iter_mut().zip(self.expansion(head, row)).for_each(|(sum, w)| *sum += q * w);
            }
            absorbed.extend(sum);
            absorbed.extend_from_slice(shared);
        }
        absorbed
    }

    /// Everything about a sequence with these inputs [T, d].
    pub(crate) fn sequence(&self, x: Vec<f64>) -> Sequence {
        let shape = &self.shape;
        let rows: Vec<&[f64]> = x.chunks_exact(shape.hidden).collect();
        let latents: Vec<Vec<f64>> = rows.iter().map(|x| self.latent(x)).collect();
        let queries: Vec<Vec<f64>> = rows.iter().map(|x| self.queries(x)).collect();
        let mut heads_out = vec![vec![0.0; shape.heads * shape.value]; rows.len()];
        for head in 0..shape.heads {
            let expand = |cached: &Vec<f64>, rows: Range<usize>| -> Vec<f64> {
                rows.map(|row| dot(self.expansion(head, row), &cached[..shape.latent])).collect()
            };
            let keys: Vec<Vec<f64>> = latents
                .iter()
                .map(|cached| [expand(cached, 0..shape.nope), cached[shape.latent..].to_vec()].concat())
                .collect();
            let values: Vec<Vec<f64>> =
                latents.iter().map(|cached| expand(cached, shape.nope..shape.nope + shape.value)).collect();
            let width = shape.nope + shape.rope;
            for (t, query) in queries.iter().enumerate() {
                let query = &query[head * width..(head + 1) * width];
                let scores: Vec<f64> = keys[..=t].iter().map(|key| self.scale() * dot(query, key)).collect();
                let out = &mut heads_out[t][head * shape.value..(head + 1) * shape.value];
                softmax_average(&scores, values.iter().map(Vec::as_slice), out);
            }
        }
        let mixed = heads_out.iter().map(|out| self.o_proj.apply(out)).collect();
        let absorbed = queries.iter().map(|query| self.absorb(query)).collect();
        Sequence { x, latents, absorbed, mixed }
    }

    /// Attention of token `t` over the given positions, those up to `t` of them.
    pub(crate) fn part(&self, sequence: &Sequence, t: usize, positions: impl IntoIterator<Item = usize>) -> Part {
        let (latent, width) = (self.shape.latent, self.shape.cache_width());
        let past = positions.into_iter().filter(|&position| position <= t);
        let cached: Vec<&Vec<f64>> = past.map(|position| &sequence.latents[position]).collect();
        let mut part = Part { output: vec![0.0; self.shape.heads * latent], lse: Vec::new() };
        for (query, out) in sequence.absorbed[t].chunks_exact(width).zip(part.output.chunks_exact_mut(latent)) {
            let scores: Vec<f64> = cached.iter().map(|cached| self.scale() * dot(query, cached)).collect();
            part.lse.push(softmax_average(&scores, cached.iter().map(|cached| &cached[..latent]), out));
        }
        part
    }
}

/// out = sum_j softmax(scores)_j values_j; returns ln sum_j e^{scores_j}. Nothing and -inf if there are no scores.
fn softmax_average<'a>(scores: &[f64], values: impl Iterator<Item = &'a [f64]>, out: &mut [f64]) -> f64 {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if scores.is_empty() {
        return most;
    }
    let total: f64 = scores.iter().map(|score| (score - most).exp()).sum();
    for (score, value) in scores.iter().zip(values) {
        let weight = (score - most).exp() / total;
        out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
    }
    most + total.ln()
}

#[cfg(test)]
mod tests {
    use super::super::super::draw::Draw;
    use super::*;

    fn layer(query_rank: Option<usize>) -> MlaLayer {
        let shape = MlaShape { hidden: 32, heads: 2, nope: 24, rope: 8, value: 16, latent: 32, query_rank, eps: 1e-6 };
        MlaLayer::draw(shape, 11, Origin::Bytes)
    }

    #[test]
    fn softmax_by_hand() {
        let values = [[1.0, 0.0], [5.0, 8.0]];
        let mut out = [0.0, 0.0];
        let lse = softmax_average(&[3.0_f64.ln(), 0.0], values.iter().map(|v| v.as_slice()), &mut out);
        assert!((lse - 4.0_f64.ln()).abs() < 1e-15);
        assert!((out[0] - 2.0).abs() < 1e-15 && (out[1] - 2.0).abs() < 1e-15, "{out:?}");
    }

    #[test]
    fn latent_space_equals_plain_attention() {
        for query_rank in [None, Some(20)] {
            let layer = layer(query_rank);
            let sequence = layer.sequence(Draw::new(2).normals(9 * 32, 1.0, DType::Fp32));
            let part = layer.part(&sequence, 6, 0..9);
            let mut values = Vec::new();
            for (head, out) in part.output.chunks_exact(32).enumerate() {
                values.extend((24..24 + 16).map(|row| dot(layer.expansion(head, row), out)));
            }
            for (found, expected) in layer.o_proj.apply(&values).iter().zip(&sequence.mixed[6]) {
                assert!((found - expected).abs() < 1e-13, "{found} {expected}");
            }
        }
    }

    #[test]
    fn an_offset_of_all_scores_shows_only_in_the_log_sum() {
        let mut layer = layer(None);
        let mut x = Draw::new(2).normals(5 * 32, 1.0, DType::Fp32);
        x.chunks_exact_mut(32).for_each(|row| row[0] = 1.0);
        layer.offset_scores(0.0);
        let before = layer.part(&layer.sequence(x.clone()), 4, 0..5);
        let offset = layer.offset_scores(120.0);
        let after = layer.part(&layer.sequence(x), 4, 0..5);
        assert!((offset - 120.0).abs() < 0.5, "{offset}");
        assert!((after.lse[1] - before.lse[1] - offset).abs() < 1e-10);
        assert!((after.output[3] - before.output[3]).abs() < 1e-12);
    }

    #[test]
    fn an_empty_part_is_zero_and_minus_infinity() {
        let layer = layer(None);
        let sequence = layer.sequence(Draw::new(2).normals(3 * 32, 1.0, DType::Fp32));
        let part = layer.part(&sequence, 1, 2..3);
        assert!(part.output.iter().all(|&out| out == 0.0));
        assert_eq!(part.lse, vec![f64::NEG_INFINITY; 2]);
    }
}
