//! Top-k, top-p and min-p over candidate tokens, in that order, with the distance of each cut from deciding
//! otherwise. Nothing here draws noise. Tokens rank by scaled logit, the lower id first among equals, so every cut is
//! deterministic.

use std::cmp::Ordering;

use crate::params::SamplingParams;

/// How many candidates top-p sorts at first; each further group is four times as large.
const FIRST_SORTED_GROUP: usize = 64;

/// A token that may be drawn, with its logit divided by the temperature (finite).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) token: u32,
    pub(crate) scaled: f64,
}

/// True where any filter can remove a candidate.
pub(crate) fn is_active(params: &SamplingParams) -> bool {
    params.top_k > 0 || params.top_p < 1.0 || params.min_p > 0.0
}

/// Removes what the filters exclude, at least one candidate stays, and returns how far the nearest cut was from another
/// decision (infinite where nothing could be cut).
pub(crate) fn apply(params: &SamplingParams, candidates: &mut Vec<Candidate>) -> f64 {
    keep_top_k(candidates, params.top_k as usize)
        .min(keep_top_p(candidates, f64::from(params.top_p)))
        .min(keep_min_p(candidates, f64::from(params.min_p)))
}

/// Keeps the k first by rank. Margin: the k-th minus the (k+1)-th scaled logit.
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) -> f64 {
    if k == 0 || k >= candidates.len() {
        return f64::INFINITY;
    }
    let (_, first_dropped, _) = candidates.select_nth_unstable_by(k, rank);
    let dropped = first_dropped.scaled;
    candidates.truncate(k);
    let last_kept = candidates.iter().map(|candidate| candidate.scaled).fold(f64::INFINITY, f64::min);
    last_kept - dropped
}

/// Keeps the shortest prefix by rank whose weights exp(scaled - max) sum to at least p times the sum over all
/// candidates (that is, over the set that top-k left, renormalised).
///
/// Margin, in logs: the last kept scaled logit minus the first dropped; the sum up to the last kept over the
/// threshold; the threshold over the sum without it. A change of all logits by less than half of it cannot move the
/// cut.
fn keep_top_p(candidates: &mut Vec<Candidate>, p: f64) -> f64 {
    if p >= 1.0 || candidates.len() < 2 {
        return f64::INFINITY;
    }
    let max = largest(candidates);
    let total: f64 = candidates.iter().map(|candidate| (candidate.scaled - max).exp()).sum();
    let threshold = p * total;

    let dropped = drop_unreachable_tail(candidates, max + ((1.0 - p) * total / (2.0 * candidates.len() as f64)).ln());

    let mut group = FIRST_SORTED_GROUP;
    let (mut kept, mut sorted) = (0, 0);
    let (mut sum, mut sum_without_last) = (0.0, 0.0);
    while kept < candidates.len() && (kept == 0 || sum < threshold) {
        if kept == sorted {
            sorted += sort_first(&mut candidates[sorted..], group);
            group *= 4;
        }
        sum_without_last = sum;
        sum += (candidates[kept].scaled - max).exp();
        kept += 1;
    }

    let first_dropped = largest(&candidates[kept..]).max(dropped);
    let last_kept = candidates[kept - 1].scaled;
    candidates.truncate(kept);

    let mut margin = f64::INFINITY;
    if first_dropped > f64::NEG_INFINITY {
        margin = margin.min(last_kept - first_dropped).min((sum / threshold).ln());
    }
    if sum_without_last > 0.0 {
        margin = margin.min((threshold / sum_without_last).ln());
    }
    margin
}

/// Drops candidates below `bound` before the sort and returns the largest scaled logit among them.
///
/// With weights below (1 - p) / 2n of the total, all of them together weigh less than half of the 1 - p that top-p
/// may leave out, so the others reach the threshold whatever the rounding of the sums.
fn drop_unreachable_tail(candidates: &mut Vec<Candidate>, bound: f64) -> f64 {
    let mut dropped = f64::NEG_INFINITY;
    candidates.retain(|candidate| {
        let keep = candidate.scaled >= bound;
        if !keep {
            dropped = dropped.max(candidate.scaled);
        }
        keep
    });
    dropped
}

/// Keeps candidates with p >= min_p * (largest p): scaled logits of at least max + ln(min_p). Renormalising changes
/// nothing in it. Margin: the smallest distance of any candidate but the first from that bound (the first is never
/// cut).
fn keep_min_p(candidates: &mut Vec<Candidate>, min_p: f64) -> f64 {
    if min_p <= 0.0 {
        return f64::INFINITY;
    }
    let Some(first) = candidates.iter().copied().min_by(rank) else { return f64::INFINITY };
    let bound = first.scaled + min_p.ln();
    let margin = candidates
        .iter()
        .filter(|candidate| candidate.token != first.token)
        .map(|candidate| (candidate.scaled - bound).abs())
        .fold(f64::INFINITY, f64::min);
    candidates.retain(|candidate| candidate.scaled >= bound);
    margin
}

/// Brings the first `count` by rank to the front, sorted, and returns how many that are.
fn sort_first(candidates: &mut [Candidate], count: usize) -> usize {
    let count = count.min(candidates.len());
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, rank);
    }
    candidates[..count].sort_unstable_by(rank);
    count
}

fn largest(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.scaled).fold(f64::NEG_INFINITY, f64::max)
}

/// Larger scaled logits first, lower ids first among equals: a total order, so selections are unique.
fn rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.scaled.total_cmp(&a.scaled).then(a.token.cmp(&b.token))
}

#[cfg(test)]
mod tests;
