//! The gated delta rule over chunks of 64 tokens (the WY / UT-transform form): everything inside a chunk is matrix
//! products, only the state is sequential over chunks. Decay factors between two tokens are e^(G_i - G_j) with G the sum of
//! log decays since the chunk's start; they never exceed 1, but their factors can overflow, so blocks of 16 tokens are
//! handled apart: a block against earlier tokens is factored about the block's first row, where both exponents are at most
//! 0, and a block against itself is formed pair by pair. Nothing is clamped.

use pulp::{Simd, WithSimd};

use crate::matrix::{View, matmul};
use crate::simd::{self, exp, exp_all};

const CHUNK: usize = 64;
const BLOCK: usize = 16;

/// One head's inputs over one row of the step, each [tokens, D] but beta [tokens].
pub(crate) struct HeadInputs {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    /// Log decay, at most 0.
    pub(crate) g: Vec<f32>,
    pub(crate) beta: Vec<f32>,
}

/// Updates `state` [D, D] and writes `out` [tokens, D].
pub(crate) fn forward(inputs: &HeadInputs, dim: usize, state: &mut [f32], out: &mut [f32]) {
    let tokens = inputs.beta.len();
    let mut first = 0;
    while first < tokens {
        let count = CHUNK.min(tokens - first);
        let span = first * dim..(first + count) * dim;
        let chunk = Chunk {
            dim,
            count,
            q: &inputs.q[span.clone()],
            k: &inputs.k[span.clone()],
            v: &inputs.v[span.clone()],
            beta: &inputs.beta[first..first + count],
            total: running_sum(&inputs.g[span.clone()], dim),
        };
        chunk.forward(state, &mut out[span]);
        first += count;
    }
}

/// Inclusive sums of the log decays from the chunk's start: restarted in every chunk, since their absolute error grows
/// with their size.
fn running_sum(g: &[f32], dim: usize) -> Vec<f32> {
    let mut total = g.to_vec();
    for row in 1..total.len() / dim {
        let (before, after) = total.split_at_mut(row * dim);
        for (after, before) in after[..dim].iter_mut().zip(&before[(row - 1) * dim..]) {
            *after += before;
        }
    }
    total
}

struct Chunk<'a> {
    dim: usize,
    count: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    beta: &'a [f32],
    /// G, [count, D].
    total: Vec<f32>,
}

impl Chunk<'_> {
    fn forward(&self, state: &mut [f32], out: &mut [f32]) {
        let (count, dim) = (self.count, self.dim);
        let (keys, queries) = self.interactions();

        let mut decay = self.total.clone();
        exp_all(&mut decay);
        let decayed = |x: &[f32]| -> Vec<f32> { x.iter().zip(&decay).map(|(x, e)| x * e).collect() };

        // Delta solves (I + Lkk) Delta = beta (V - (K . e^G) S): forward substitution, exact for repeated keys.
        let mut delta = vec![0f32; count * dim];
        let square = View::new(state, dim, dim);
        matmul(View::new(&decayed(self.k), count, dim), square, 0.0, &mut delta, dim);
        for ((delta, v), &beta) in delta.chunks_exact_mut(dim).zip(self.v.chunks_exact(dim)).zip(self.beta) {
            for (delta, v) in delta.iter_mut().zip(v) {
                *delta = beta * (v - *delta);
            }
        }
        for row in 1..count {
            let (done, rest) = delta.split_at_mut(row * dim);
            let scales: Vec<f32> = keys[row * count..row * count + row].iter().map(|l| -l).collect();
            simd::add_scaled_rows(&scales, done, &mut rest[..dim]);
        }

        matmul(View::new(&decayed(self.q), count, dim), square, 0.0, out, dim);
        matmul(View::new(&queries, count, count), View::new(&delta, count, dim), 1.0, out, dim);

        let last = &self.total[(count - 1) * dim..];
        let mut carried: Vec<f32> =
            self.total.chunks_exact(dim).flat_map(|row| last.iter().zip(row).map(|(last, g)| last - g)).collect();
        exp_all(&mut carried);
        carried.iter_mut().zip(self.k).for_each(|(e, k)| *e *= k);
        for (row, &gamma) in state.chunks_exact_mut(dim).zip(&decay[(count - 1) * dim..]) {
            row.iter_mut().for_each(|value| *value *= gamma);
        }
        matmul(View::new(&carried, count, dim).t(), View::new(&delta, count, dim), 1.0, state, dim);
    }

    /// Lkk (strictly lower) and Pqk (lower), each [count, count] with zeros above.
    fn interactions(&self) -> (Vec<f32>, Vec<f32>) {
        let (count, dim) = (self.count, self.dim);
        let mut keys = vec![0f32; count * count];
        let mut queries = vec![0f32; count * count];
        for first in (0..count).step_by(BLOCK) {
            let rows = BLOCK.min(count - first);
            if first > 0 {
                self.against_earlier(first, rows, &mut keys, &mut queries);
            }
            simd::dispatch(Diagonal { chunk: self, first, rows, keys: &mut keys, queries: &mut queries });
        }
        for (row, &beta) in keys.chunks_exact_mut(count).zip(self.beta) {
            row.iter_mut().for_each(|value| *value *= beta);
        }
        debug_assert_eq!(keys.len(), self.total.len() / dim * count);
        (keys, queries)
    }

    /// A block's rows against every token before the block, factored about G at the block's first row.
    fn against_earlier(&self, first: usize, rows: usize, keys: &mut [f32], queries: &mut [f32]) {
        let (count, dim) = (self.count, self.dim);
        let reference = &self.total[first * dim..(first + 1) * dim];
        let block = first * dim..(first + rows) * dim;
        let mut down: Vec<f32> = self.total[block.clone()]
            .chunks_exact(dim)
            .flat_map(|row| row.iter().zip(reference).map(|(g, r)| g - r))
            .collect();
        exp_all(&mut down);
        let mut up: Vec<f32> = self.total[..first * dim]
            .chunks_exact(dim)
            .flat_map(|row| row.iter().zip(reference).map(|(g, r)| r - g))
            .collect();
        exp_all(&mut up);
        up.iter_mut().zip(self.k).for_each(|(e, k)| *e *= k);
        let earlier = View::new(&up, first, dim).t();
        for (x, out) in [(self.k, keys), (self.q, queries)] {
            let scaled: Vec<f32> = x[block.clone()].iter().zip(&down).map(|(x, e)| x * e).collect();
            matmul(View::new(&scaled, rows, dim), earlier, 0.0, &mut out[first * count..], count);
        }
    }
}

/// A block against itself, pair by pair: each factor e^(G_i - G_j), j <= i, is formed directly.
struct Diagonal<'a> {
    chunk: &'a Chunk<'a>,
    first: usize,
    rows: usize,
    keys: &'a mut [f32],
    queries: &'a mut [f32],
}

impl WithSimd for Diagonal<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        const LANES: usize = 16;
        let Chunk { dim, count, q, k, total, .. } = self.chunk;
        let (dim, count) = (*dim, *count);
        for i in self.first..self.first + self.rows {
            let span = i * dim..(i + 1) * dim;
            let (gi, qi, ki) = (&total[span.clone()], &q[span.clone()], &k[span]);
            for j in self.first..=i {
                let span = j * dim..(j + 1) * dim;
                let (gj, kj) = (&total[span.clone()], &k[span]);
                let (mut from_key, mut from_query) = ([0f32; LANES], [0f32; LANES]);
                let mut channel = 0;
                while channel + LANES <= dim {
                    for lane in 0..LANES {
                        let c = channel + lane;
                        let weighted = kj[c] * exp(gi[c] - gj[c]);
                        from_key[lane] = ki[c].mul_add(weighted, from_key[lane]);
                        from_query[lane] = qi[c].mul_add(weighted, from_query[lane]);
                    }
                    channel += LANES;
                }
                for c in channel..dim {
                    let weighted = kj[c] * exp(gi[c] - gj[c]);
                    from_key[0] += ki[c] * weighted;
                    from_query[0] += qi[c] * weighted;
                }
                if j < i {
                    self.keys[i * count + j] = from_key.iter().sum();
                }
                self.queries[i * count + j] = from_query.iter().sum();
            }
        }
    }
}
