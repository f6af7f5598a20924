//! The mistakes that take more than another constant. Nothing here is the model's arithmetic.

use perigee_backend::Row;

use crate::ops::kda_chunk::HeadInputs;
use crate::tensor::round_bf16;

/// Base of the rotary frequencies.
const THETA: f32 = 10_000.0;

/// The delta rule that reads the state before it decays.
pub(super) fn decay_after_read(inputs: &HeadInputs, dim: usize, state: &mut [f32], out: &mut [f32]) {
    for (step, out) in out.chunks_exact_mut(dim).enumerate() {
        let span = step * dim..(step + 1) * dim;
        let delta = correction(inputs, step, state);
        decay(state, &inputs.g[span.clone()]);
        write(state, &inputs.k[span.clone()], &delta);
        out.copy_from_slice(&read(state, &inputs.q[span]));
    }
}

/// The delta rule whose state does not keep float32 from token to token.
pub(super) fn rounded_state(inputs: &HeadInputs, dim: usize, state: &mut [f32], out: &mut [f32]) {
    for (step, out) in out.chunks_exact_mut(dim).enumerate() {
        let span = step * dim..(step + 1) * dim;
        decay(state, &inputs.g[span.clone()]);
        let delta = correction(inputs, step, state);
        write(state, &inputs.k[span.clone()], &delta);
        out.copy_from_slice(&read(state, &inputs.q[span]));
        round_bf16(state);
    }
}

/// beta (v - S^T k) of one token.
fn correction(inputs: &HeadInputs, step: usize, state: &[f32]) -> Vec<f32> {
    let dim = inputs.v.len() / inputs.beta.len();
    let span = step * dim..(step + 1) * dim;
    let mut delta = read(state, &inputs.k[span.clone()]);
    delta.iter_mut().zip(&inputs.v[span]).for_each(|(delta, v)| *delta = inputs.beta[step] * (v - *delta));
    delta
}

fn decay(state: &mut [f32], log_decay: &[f32]) {
    for (row, g) in state.chunks_exact_mut(log_decay.len()).zip(log_decay) {
        row.iter_mut().for_each(|value| *value *= g.exp());
    }
}

/// S^T x.
fn read(state: &[f32], x: &[f32]) -> Vec<f32> {
    let mut out = vec![0f32; x.len()];
    for (row, x) in state.chunks_exact(x.len()).zip(x) {
        out.iter_mut().zip(row).for_each(|(out, value)| *out += x * value);
    }
    out
}

/// S += k delta^T.
fn write(state: &mut [f32], k: &[f32], delta: &[f32]) {
    for (row, k) in state.chunks_exact_mut(delta.len()).zip(k) {
        row.iter_mut().zip(delta).for_each(|(value, delta)| *value += k * delta);
    }
}

/// Rotates neighbouring pairs among the last `rope` of every `width` channels by the token's position.
pub(super) fn rotate(rows: &[Row], (width, rope): (usize, usize), values: &mut [f32]) {
    let tokens: usize = rows.iter().map(|row| row.tokens as usize).sum();
    let per_token = values.len() / tokens;
    let positions = rows.iter().flat_map(|row| row.position..row.position + u64::from(row.tokens));
    for (token, position) in values.chunks_exact_mut(per_token).zip(positions) {
        for head in token.chunks_exact_mut(width) {
            for (pair, channels) in head[width - rope..].chunks_exact_mut(2).enumerate() {
                let (sin, cos) = (position as f32 * THETA.powf(-2.0 * pair as f32 / rope as f32)).sin_cos();
                let (a, b) = (channels[0], channels[1]);
                (channels[0], channels[1]) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
    }
}
