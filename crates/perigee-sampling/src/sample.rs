//! Draws one token from one row of logits. The order of operations is fixed: repetition penalty, frequency and
//! presence penalty, bias, masks; then greedy, or temperature, top-k, top-p, min-p and Gumbel-max. It keeps no state
//! between draws; what a draw depends on is all in [`Draw`].
//!
//! Gumbel-max: the argmax of scaled logit plus independent Gumbel noise is distributed as the softmax of the scaled
//! logits (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). With noise that is a function of (seed, choice,
//! position, token) the draw repeats on any device, and needs no sum over the vocabulary.

use crate::adjust::{apply_allowed, apply_banned, apply_bias, apply_penalties};
use crate::counts::TokenCounts;
use crate::filter::{self, Candidate};
use crate::logprobs;
use crate::noise::{GUMBEL_CEILING, Noise};
use crate::params::SamplingParams;

/// Everything a draw depends on besides the logits.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a> {
    /// The request's parameters, already checked with [`SamplingParams::validate`].
    pub params: &'a SamplingParams,
    /// Which of the request's n choices this is, from 0.
    pub choice: u32,
    /// The absolute position of the token to be drawn, counted from the start of the prompt.
    pub position: u64,
    /// Tokens seen so far; read only where [`SamplingParams::needs_counts`].
    pub counts: &'a TokenCounts,
    /// Tokens that may not be drawn here, such as the end of sequence before min_tokens. Ids beyond the vocabulary
    /// are ignored.
    pub banned: &'a [u32],
    /// A grammar's mask where there is one: token t is allowed if bit t % 64 of word t / 64 is set.
    pub allowed: Option<&'a [u64]>,
}

/// The outcome of a draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token drawn.
    pub token: u32,
    /// Its logprob under the raw logits (log-softmax before penalties, bias, masks and temperature), where asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens under the raw logits with their logprobs, as many as asked for.
    pub top: Vec<(u32, f32)>,
    /// How far this draw was from another outcome; infinite where there was only one. The smallest of: the winner's
    /// score minus the runner-up's (adjusted logits for greedy; scaled logits plus noise otherwise), and the distance
    /// of each filter's cut: for top-k the k-th minus the (k+1)-th scaled logit; for top-p the same at its cut, and
    /// the logs of (sum up to the cut / threshold) and (threshold / sum before the cut); for min-p the smallest
    /// distance of a scaled logit but the largest from its bound. Runs whose logits differ by rounding may draw
    /// different tokens only where this is small.
    pub margin: f32,
}

/// Why no token could be drawn.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model produced a NaN or +infinity.
    #[error(
        "the logit of token {token} is {value}; logits must be finite or -infinity, so the forward pass went wrong"
    )]
    BadLogit {
        /// The first such token.
        token: u32,
        /// Its logit.
        value: f32,
    },
    /// Every token is impossible.
    #[error("no token can be drawn: every logit is -infinity, banned, or outside the allowed set")]
    NoCandidate,
    /// The mask does not cover the vocabulary.
    #[error("the mask of allowed tokens has {words} words of 64 bits, too few for {vocab} logits")]
    MaskTooShort {
        /// Words in the mask.
        words: usize,
        /// Logits in the row.
        vocab: usize,
    },
    /// A logprob was asked for a token that is not in the row.
    #[error("token {token} is outside the {vocab} logits of the row")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Logits in the row.
        vocab: usize,
    },
}

/// Buffers that draws reuse, so that a step allocates nothing once they have grown to the vocabulary.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Scratch {
    /// Empty buffers.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Draws a token from raw logits \[vocabulary\].
///
/// Scaled logits are f64(adjusted logit) / f64(temperature); scores are that plus the noise of [`crate::noise`] in
/// f64. Ties go to the lowest id. The filters' semantics: top-k keeps the k first by (logit descending, id
/// ascending); top-p keeps the smallest prefix of what is left in that order whose renormalised probability reaches
/// p; min-p keeps what is at least min_p times as likely as the most likely one.
///
/// # Errors
/// [`SampleError::BadLogit`] for NaN or +infinity, [`SampleError::MaskTooShort`], and [`SampleError::NoCandidate`]
/// where nothing can be drawn (an empty row too).
pub fn sample(logits: &[f32], draw: &Draw<'_>, scratch: &mut Scratch) -> Result<Sampled, SampleError> {
    check_logits(logits)?;
    if let Some(allowed) = draw.allowed
        && allowed.len().saturating_mul(64) < logits.len()
    {
        return Err(SampleError::MaskTooShort { words: allowed.len(), vocab: logits.len() });
    }

    let Scratch { logits: adjusted, candidates } = scratch;
    adjusted.clear();
    adjusted.extend_from_slice(logits);
    apply_penalties(adjusted, draw.params, draw.counts);
    apply_bias(adjusted, &draw.params.logit_bias);
    apply_banned(adjusted, draw.banned);
    if let Some(allowed) = draw.allowed {
        apply_allowed(adjusted, allowed);
    }

    let (token, margin) = choose(adjusted, draw, candidates).ok_or(SampleError::NoCandidate)?;
    let (logprob, top) = match draw.params.logprobs {
        Some(n) => {
            let reported = logprobs::of_token(logits, token, n)?;
            (Some(reported.logprob), reported.top)
        }
        None => (None, Vec::new()),
    };
    Ok(Sampled { token, logprob, top, margin: margin as f32 })
}

/// Refuses logits that only a failed forward pass produces.
pub(crate) fn check_logits(logits: &[f32]) -> Result<(), SampleError> {
    match logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        Some(token) => Err(SampleError::BadLogit { token: token as u32, value: logits[token] }),
        None => Ok(()),
    }
}

/// The winner among the adjusted logits, and the margin; nothing where all are -infinity.
fn choose(adjusted: &[f32], draw: &Draw<'_>, candidates: &mut Vec<Candidate>) -> Option<(u32, f64)> {
    if draw.params.is_greedy() {
        return best(scaled_candidates(adjusted, 1.0), 0.0, |_| 0.0);
    }
    let temperature = f64::from(draw.params.temperature);
    let mut noise = Noise::new(draw.params.seed, draw.choice, draw.position);
    let gumbel = |token| noise.gumbel(token);
    if !filter::is_active(draw.params) {
        return best(scaled_candidates(adjusted, temperature), GUMBEL_CEILING, gumbel);
    }
    candidates.clear();
    candidates.extend(scaled_candidates(adjusted, temperature));
    if candidates.is_empty() {
        return None;
    }
    let cut_margin = filter::apply(draw.params, candidates);
    let (token, margin) = best(candidates.iter().copied(), GUMBEL_CEILING, gumbel)?;
    Some((token, margin.min(cut_margin)))
}

/// The tokens that are possible, with their logits divided by the temperature in f64, where even the smallest f32
/// temperature overflows nothing.
fn scaled_candidates(adjusted: &[f32], temperature: f64) -> impl Iterator<Item = Candidate> + '_ {
    adjusted.iter().enumerate().filter(|&(_, &logit)| logit != f32::NEG_INFINITY).map(move |(token, &logit)| {
        // Adding zero turns -0 into +0: the two are equal, and must rank so.
        Candidate { token: token as u32, scaled: f64::from(logit) / temperature + 0.0 }
    })
}

/// The candidate with the largest scaled logit plus noise (lowest id among equals), and its lead over the second
/// (infinite where there is none). Candidates that could not become second even with the largest noise, `ceiling`,
/// are passed over without drawing it.
fn best(
    candidates: impl Iterator<Item = Candidate>,
    ceiling: f64,
    mut noise: impl FnMut(u32) -> f64,
) -> Option<(u32, f64)> {
    let mut winner: Option<(u32, f64)> = None;
    let mut second = f64::NEG_INFINITY;
    for candidate in candidates {
        if candidate.scaled + ceiling < second {
            continue;
        }
        let score = candidate.scaled + noise(candidate.token);
        match winner {
            Some((token, lead)) if score < lead || (score == lead && candidate.token > token) => {
                second = second.max(score);
            }
            Some((_, lead)) => {
                second = lead;
                winner = Some((candidate.token, score));
            }
            None => winner = Some((candidate.token, score)),
        }
    }
    winner.map(|(token, score)| (token, score - second))
}
