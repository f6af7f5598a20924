//! The KDA mixer: projections, short convolutions, gates, the gated delta rule per head, gated norm and output projection.
//! Rows of one token step the recurrence; longer rows go through the chunked form of `kda_chunk`.

use perigee_backend::weights::KdaWeights;
use perigee_backend::{KdaShape, Result};

use crate::formula::{Fault, Formula};
use crate::matrix::{Matrix, load_vector};
use crate::ops::kda_chunk::{self, HeadInputs};
use crate::ops::norm::rms_norm_in_place;
use crate::simd::{self, exp_all, sigmoid_all, silu_all};
use crate::states::LayerState;
use crate::tensor::round_bf16;
use crate::workers::Workers;
use pulp::{Simd, WithSimd};

/// Rows of at least this many tokens use the chunked form.
const CHUNKED_TOKENS: usize = 8;

/// Weights of a KDA mixer on this rank; P = heads * D.
#[derive(Debug)]
pub struct Kda {
    pub(crate) shape: KdaShape,
    qkv_proj: [Matrix; 3],
    /// [3][W, P]: tap outermost, so that a tap's channels lie together.
    qkv_conv: [Vec<f32>; 3],
    f_a: Matrix,
    f_b: Matrix,
    dt_bias: Vec<f32>,
    /// -exp(A_log), [heads].
    decay: Vec<f32>,
    b: Matrix,
    g_a: Matrix,
    g_b: Matrix,
    o_norm: Vec<f32>,
    o: Matrix,
    formula: Formula,
}

/// A row of the step: how many tokens it has.
pub(crate) struct KdaRow<'a> {
    pub(crate) tokens: usize,
    pub(crate) state: LayerState<'a>,
}

impl Kda {
    pub(crate) fn load(shape: &KdaShape, weights: &KdaWeights<'_>, formula: Formula) -> Result<Self> {
        let KdaShape { hidden, heads, head_dim, conv, eps } = *shape;
        let eps = if formula.has(Fault::OutputNormEpsilon) { 1e-6 } else { eps };
        let inner = heads * head_dim;
        let proj = |i: usize| Matrix::load(&weights.qkv_proj[i], inner, hidden);
        let taps = |i: usize| -> Result<Vec<f32>> {
            weights.qkv_conv[i].expect(&[inner, conv])?;
            let mut taps = weights.qkv_conv[i].to_f32()?;
            if formula.has(Fault::ReversedTaps) {
                taps.chunks_exact_mut(conv).for_each(<[f32]>::reverse);
            }
            Ok(transpose(&taps, conv))
        };
        Ok(Self {
            shape: KdaShape { eps, ..*shape },
            qkv_proj: [proj(0)?, proj(1)?, proj(2)?],
            qkv_conv: [taps(0)?, taps(1)?, taps(2)?],
            f_a: Matrix::load(&weights.f_a_proj, head_dim, hidden)?,
            f_b: Matrix::load(&weights.f_b_proj, inner, head_dim)?,
            dt_bias: load_vector(&weights.dt_bias, inner)?,
            decay: load_vector(&weights.a_log, heads)?.into_iter().map(|a| -a.exp()).collect(),
            b: Matrix::load(&weights.b_proj, heads, hidden)?,
            g_a: Matrix::load(&weights.g_a_proj, head_dim, hidden)?,
            g_b: Matrix::load(&weights.g_b_proj, inner, head_dim)?,
            o_norm: load_vector(&weights.o_norm, head_dim)?,
            o: Matrix::load(&weights.o_proj, hidden, inner)?,
            formula,
        })
    }

    /// x [tokens, d] to this rank's partial sum in `out` [tokens, d]; states are updated in place.
    pub(crate) fn forward(&self, workers: &Workers, rows: Vec<KdaRow<'_>>, x: &[f32], rounded: bool, out: &mut [f32]) {
        let KdaShape { hidden, heads, head_dim, eps, .. } = self.shape;
        let inner = heads * head_dim;
        let tokens = x.len() / hidden;
        let round = |values: &mut Vec<f32>| {
            if rounded {
                round_bf16(values);
            }
        };
        let product = |matrix: &Matrix, x: &[f32]| {
            let mut out = vec![0f32; tokens * matrix.rows()];
            matrix.product(workers, x, &mut out);
            out
        };
        let low_rank = |a: &Matrix, b: &Matrix| {
            let mut inner = product(a, x);
            round(&mut inner);
            product(b, &inner)
        };
        let mut qkv = self.qkv_proj.each_ref().map(|matrix| product(matrix, x));
        qkv.iter_mut().for_each(&round);
        let mut log_decay = low_rank(&self.f_a, &self.f_b);
        self.log_decay(&mut log_decay);
        let mut beta = product(&self.b, x);
        sigmoid_all(&mut beta);
        round(&mut beta);

        // Convolve row by row, then hand every (row, head) to a task of its own.
        let mut tasks = Vec::with_capacity(rows.len() * heads);
        let mut first = 0;
        for row in rows {
            let span = first * inner..(first + row.tokens) * inner;
            let tail = row.state.conv.len() / 3;
            for (which, tail) in row.state.conv.chunks_exact_mut(tail).enumerate() {
                self.convolve(which, tail, &mut qkv[which][span.clone()]);
            }
            for (head, state) in row.state.recurrent.chunks_exact_mut(head_dim * head_dim).enumerate() {
                tasks.push((first, row.tokens, head, state));
            }
            first += row.tokens;
        }
        qkv.iter_mut().for_each(&round);
        let [q, k, v] = &qkv;
        let results = workers.map(tasks, |(first, tokens, head, state)| {
            let inputs = self.gather(first, tokens, head, [q, k, v, &log_decay], &beta);
            let mut o = vec![0f32; tokens * head_dim];
            if let Some(recurrence) = self.formula.recurrence() {
                recurrence(&inputs, head_dim, state, &mut o);
            } else if tokens >= CHUNKED_TOKENS {
                kda_chunk::forward(&inputs, head_dim, state, &mut o);
            } else {
                recur(&inputs, head_dim, state, &mut o);
            }
            (first, head, o)
        });
        let mut gate = low_rank(&self.g_a, &self.g_b);
        round(&mut gate);
        if self.formula.has(Fault::SiluGate) {
            silu_all(&mut gate)
        } else {
            sigmoid_all(&mut gate)
        }
        let mut mixed = vec![0f32; tokens * inner];
        for (first, head, mut o) in results {
            round(&mut o);
            for (step, o) in o.chunks_exact_mut(head_dim).enumerate() {
                rms_norm_in_place(o, &self.o_norm, eps);
                let start = (first + step) * inner + head * head_dim;
                for ((mixed, o), gate) in mixed[start..].iter_mut().zip(o).zip(&gate[start..start + head_dim]) {
                    *mixed = *o * gate;
                }
            }
        }
        round(&mut mixed);
        self.o.product(workers, &mixed, out);
    }

    /// z [tokens, P] to g = -exp(A_log) softplus(z + dt_bias); above 20 softplus is the identity, as in the reference.
    fn log_decay(&self, z: &mut [f32]) {
        let head_dim = self.shape.head_dim;
        for row in z.chunks_exact_mut(self.dt_bias.len()) {
            for (channel, (z, bias)) in row.iter_mut().zip(&self.dt_bias).enumerate() {
                let shifted = *z + bias;
                let softplus = if shifted > 20.0 { shifted } else { shifted.exp().ln_1p() };
                *z = self.decay[channel / head_dim] * softplus;
            }
        }
    }

    /// Depthwise causal convolution and silu in place over a row's inputs [tokens, P]; the tail [P, W - 1] holds the
    /// inputs before them and is left holding the last ones.
    fn convolve(&self, which: usize, tail: &mut [f32], inputs: &mut [f32]) {
        let KdaShape { conv, heads, head_dim, .. } = self.shape;
        let inner = heads * head_dim;
        // Tails are kept channel by channel, [P, W - 1]; the convolution wants whole tokens.
        let mut padded = transpose(tail, conv - 1);
        padded.extend_from_slice(inputs);
        simd::convolve(&padded, &self.qkv_conv[which], inner, inputs);
        silu_all(inputs);
        let last = &padded[padded.len() - (conv - 1) * inner..];
        tail.copy_from_slice(&transpose(last, inner));
    }

    /// One head's inputs over one row: q and k normalised, q scaled by D^-1/2.
    fn gather(
        &self,
        first: usize,
        tokens: usize,
        head: usize,
        [q, k, v, g]: [&Vec<f32>; 4],
        beta: &[f32],
    ) -> HeadInputs {
        let KdaShape { heads, head_dim, .. } = self.shape;
        let inner = heads * head_dim;
        let take = |from: &Vec<f32>| {
            let mut out = Vec::with_capacity(tokens * head_dim);
            for token in first..first + tokens {
                let start = token * inner + head * head_dim;
                out.extend_from_slice(&from[start..start + head_dim]);
            }
            out
        };
        let normalise = |mut values: Vec<f32>, scale: f32| {
            for row in values.chunks_exact_mut(head_dim) {
                let factor = scale / (simd::dot(row, row) + 1e-6).sqrt();
                row.iter_mut().for_each(|value| *value *= factor);
            }
            values
        };
        let scale = if self.formula.has(Fault::NoQueryScale) { 1.0 } else { (1.0 / (head_dim as f64).sqrt()) as f32 };
        HeadInputs {
            q: normalise(take(q), scale),
            k: normalise(take(k), 1.0),
            v: take(v),
            g: take(g),
            beta: (first..first + tokens).map(|token| beta[token * heads + head]).collect(),
        }
    }
}

/// [rows, columns] to [columns, rows], row-major.
fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

struct Step<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    decay: &'a [f32],
    beta: f32,
    state: &'a mut [f32],
    delta: &'a mut [f32],
    out: &'a mut [f32],
}

impl WithSimd for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let width = self.v.len();
        self.delta.fill(0.0);
        for ((row, &decay), &k) in self.state.chunks_exact_mut(width).zip(self.decay).zip(self.k) {
            for (state, read) in row.iter_mut().zip(self.delta.iter_mut()) {
                *state *= decay;
                *read = k.mul_add(*state, *read);
            }
        }
        for (delta, v) in self.delta.iter_mut().zip(self.v) {
            *delta = self.beta * (v - *delta);
        }
        self.out.fill(0.0);
        for ((row, &k), &q) in self.state.chunks_exact_mut(width).zip(self.k).zip(self.q) {
            for ((state, delta), out) in row.iter_mut().zip(self.delta.iter()).zip(self.out.iter_mut()) {
                *state = k.mul_add(*delta, *state);
                *out = q.mul_add(*state, *out);
            }
        }
    }
}

/// The recurrence, token by token: decay, read with k, correct towards v, write, read with q.
fn recur(inputs: &HeadInputs, head_dim: usize, state: &mut [f32], out: &mut [f32]) {
    let mut delta = vec![0f32; head_dim];
    let mut decay = inputs.g.clone();
    exp_all(&mut decay);
    for (step, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let span = step * head_dim..(step + 1) * head_dim;
        simd::dispatch(Step {
            q: &inputs.q[span.clone()],
            k: &inputs.k[span.clone()],
            v: &inputs.v[span.clone()],
            decay: &decay[span],
            beta: inputs.beta[step],
            state,
            delta: &mut delta,
            out,
        });
    }
}
