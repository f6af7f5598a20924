//! Log-probabilities of the model's own distribution: log-softmax of the raw logits, before penalties, bias, masks,
//! temperature and filters. Sums are taken in f64. It does not choose tokens.

use crate::sample::SampleError;

/// The logprob of one token and of the most likely ones at the same place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The natural logarithm of the token's probability.
    pub logprob: f32,
    /// The most likely tokens with their logprobs, most likely first, lower ids first among equals.
    pub top: Vec<(u32, f32)>,
}

/// The logprob of `token` under one row of raw logits \[vocabulary\], and the `n` most likely tokens (fewer where the
/// vocabulary is smaller). For a prompt, row i predicts token i + 1.
///
/// # Errors
/// [`SampleError`] for a NaN or +infinity in the row, a row without any finite logit, and a token outside the row.
pub fn prompt_logprobs(logits_row: &[f32], token: u32, n: u32) -> Result<TokenLogprobs, SampleError> {
    crate::sample::check_logits(logits_row)?;
    of_token(logits_row, token, n)
}

/// As [`prompt_logprobs`], for a row that is known to hold no NaN and no +infinity.
pub(crate) fn of_token(logits: &[f32], token: u32, n: u32) -> Result<TokenLogprobs, SampleError> {
    let Some(&logit) = logits.get(token as usize) else {
        return Err(SampleError::TokenOutOfRange { token, vocab: logits.len() });
    };
    let normaliser = log_sum_exp(logits);
    if normaliser == f64::NEG_INFINITY {
        return Err(SampleError::NoCandidate);
    }
    let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
    let top = largest(logits, n as usize).into_iter().map(|(token, logit)| (token, logprob(logit))).collect();
    Ok(TokenLogprobs { logprob: logprob(logit), top })
}

/// ln of the sum of exp over the row, shifted by the largest so that nothing overflows.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    if max == f64::NEG_INFINITY {
        return max;
    }
    max + logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum::<f64>().ln()
}

/// The n largest logits in order. One pass with an insertion list: n is small, and most tokens fail the first
/// comparison.
fn largest(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(n.min(logits.len()));
    if n == 0 {
        return top;
    }
    for (token, &logit) in logits.iter().enumerate() {
        if top.len() == n {
            if top.last().is_some_and(|&(_, smallest)| logit <= smallest) {
                continue;
            }
            top.pop();
        }
        // Tokens come in ascending order, so going behind the equal ones keeps lower ids first.
        let place = top.partition_point(|&(_, other)| other >= logit);
        top.insert(place, (token as u32, logit));
    }
    top
}
