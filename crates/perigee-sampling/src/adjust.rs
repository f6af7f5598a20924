//! What changes a row of logits before a token is chosen: penalties, bias and masks, in that order. Temperature and
//! filters are not here, and the model's own logits are never written: the caller works on a copy.
//!
//! Each operation is one correctly rounded f32 operation, in the order written, without fused multiply-add, so that a
//! device can repeat the bits.

use crate::counts::TokenCounts;
use crate::params::SamplingParams;

/// Repetition penalty over prompt and output (Keskar et al. 2019, arXiv:1909.05858: positive logits are divided, others
/// multiplied), then frequency and presence penalty over the output alone.
pub(crate) fn apply_penalties(logits: &mut [f32], params: &SamplingParams, counts: &TokenCounts) {
    if !params.needs_counts() {
        return;
    }
    for (token, count) in counts.iter() {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        if *logit == f32::NEG_INFINITY {
            continue;
        }
        let mut value = *logit;
        value = if value > 0.0 { value / params.repetition_penalty } else { value * params.repetition_penalty };
        if count.output > 0 {
            value -= params.frequency_penalty * count.output as f32;
            value -= params.presence_penalty;
        }
        *logit = saturate(value);
    }
}

/// Adds the bias of each listed token.
pub(crate) fn apply_bias(logits: &mut [f32], bias: &[(u32, f32)]) {
    for &(token, value) in bias {
        if let Some(logit) = logits.get_mut(token as usize)
            && *logit != f32::NEG_INFINITY
        {
            *logit = saturate(*logit + value);
        }
    }
}

/// Makes the banned tokens impossible. Ids outside the row are of no effect: nothing could draw them.
pub(crate) fn apply_banned(logits: &mut [f32], banned: &[u32]) {
    for &token in banned {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Makes every token impossible whose bit is not set; token t is bit t % 64 of word t / 64.
pub(crate) fn apply_allowed(logits: &mut [f32], allowed: &[u64]) {
    for (chunk, &word) in logits.chunks_mut(64).zip(allowed) {
        if word == u64::MAX {
            continue;
        }
        for (bit, logit) in chunk.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Extreme penalties and biases saturate at the largest finite number, so that infinity keeps its one meaning,
/// impossible.
fn saturate(value: f32) -> f32 {
    value.clamp(-f32::MAX, f32::MAX)
}
