//! Mixture of experts: sigmoid router in float32, biased selection within the best groups, unbiased weights, routed and
//! shared experts as one partial sum. No capacity limit: no token is dropped.

use perigee_backend::weights::MoeWeights;
use perigee_backend::{BackendError, MlpShape, MoeShape, Result, Routing};

use crate::formula::{Fault, Formula};
use crate::matrix::{Matrix, load_vector};
use crate::ops::mlp::Mlp;
use crate::simd::sigmoid_all;
use crate::tensor::round_bf16;
use crate::workers::Workers;

/// Weights of a mixture of experts on this rank.
#[derive(Debug)]
pub struct Moe {
    shape: MoeShape,
    router: Matrix,
    bias: Vec<f32>,
    experts: Vec<Mlp>,
    shared: Option<Mlp>,
    formula: Formula,
}

/// What one layer did with the step's tokens.
pub(crate) struct Selection {
    /// The layer's own choice, `top_k` for each token, ascending.
    pub(crate) own: Vec<u32>,
    /// For every expert, the tokens that use it and their weights.
    assigned: Vec<Vec<(usize, f32)>>,
}

impl Selection {
    /// Experts that some token uses.
    pub(crate) fn touched(&self) -> u64 {
        self.assigned.iter().filter(|tokens| !tokens.is_empty()).count() as u64
    }
}

impl Moe {
    pub(crate) fn load(shape: &MoeShape, weights: &MoeWeights<'_>, formula: Formula) -> Result<Self> {
        if weights.experts.len() != shape.experts {
            return Err(BackendError::shape("routed experts", &[shape.experts], &[weights.experts.len()]));
        }
        let mut bias = load_vector(&weights.bias, shape.experts)?;
        if formula.has(Fault::UnbiasedSelection) {
            bias.fill(0.0);
        }
        let expert = MlpShape { hidden: shape.hidden, width: shape.width };
        let shared = MlpShape { hidden: shape.hidden, width: shape.shared_width };
        Ok(Self {
            shape: *shape,
            router: Matrix::load(&weights.router, shape.experts, shape.hidden)?,
            bias,
            experts: weights.experts.iter().map(|weights| Mlp::load(&expert, weights)).collect::<Result<_>>()?,
            shared: weights.shared.as_ref().map(|weights| Mlp::load(&shared, weights)).transpose()?,
            formula,
        })
    }

    /// Scores, selection and weights for `x` [tokens, d].
    pub(crate) fn route(&self, workers: &Workers, x: &[f32], routing: Routing<'_>) -> Result<Selection> {
        let MoeShape { experts, top_k, .. } = self.shape;
        let tokens = x.len() / self.shape.hidden;
        let mut scores = self.scores(workers, x);
        let mut own = Vec::with_capacity(tokens * top_k);
        for scores in scores.chunks_exact(experts) {
            own.extend(select(&self.shape, scores, &self.bias));
        }
        if self.formula.has(Fault::BiasedWeights) {
            for scores in scores.chunks_exact_mut(experts) {
                scores.iter_mut().zip(&self.bias).for_each(|(score, bias)| *score += bias);
            }
        }
        let used = match routing {
            Routing::Free => &own[..],
            Routing::Forced(forced) => {
                if forced.len() != own.len() {
                    return Err(BackendError::shape("forced experts", &[tokens, top_k], &[forced.len()]));
                }
                forced
            }
        };
        let mut assigned = vec![Vec::new(); experts];
        for (token, (scores, used)) in scores.chunks_exact(experts).zip(used.chunks_exact(top_k)).enumerate() {
            if let Some(&expert) = used.iter().find(|&&expert| expert as usize >= experts) {
                return Err(BackendError::Range { what: "expert", index: expert.into(), limit: experts as u64 });
            }
            let sum: f32 = used.iter().map(|&expert| scores[expert as usize]).sum();
            for &expert in used {
                let mut weight = scores[expert as usize];
                if self.shape.renormalize {
                    weight /= sum + 1e-20;
                }
                assigned[expert as usize].push((token, weight * self.shape.scale));
            }
        }
        Ok(Selection { own, assigned })
    }

    /// Scores [tokens, experts] of `x` [tokens, d].
    fn scores(&self, workers: &Workers, x: &[f32]) -> Vec<f32> {
        let mut scores = vec![0f32; x.len() / self.shape.hidden * self.shape.experts];
        self.router.product(workers, x, &mut scores);
        sigmoid_all(&mut scores);
        scores
    }

    /// How close each token's choice is: the last chosen score minus the first that is not, of groups too.
    #[cfg(feature = "planted-faults")]
    pub(crate) fn gaps(&self, workers: &Workers, x: &[f32]) -> Vec<f32> {
        let scores = self.scores(workers, x);
        let gap = |values: &[f32], count: usize| {
            let mut sorted = values.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            sorted.get(count).map_or(f32::INFINITY, |next| sorted[count - 1] - next)
        };
        let of_token = |scores: &[f32]| {
            let (biased, totals) = eligible(&self.shape, scores, &self.bias);
            gap(&biased, self.shape.top_k).min(gap(&totals, self.shape.top_groups.min(totals.len())))
        };
        scores.chunks_exact(self.shape.experts).map(of_token).collect()
    }

    /// Routed plus shared experts, this rank's partial sum, into `out` [tokens, d].
    pub(crate) fn forward(&self, workers: &Workers, x: &[f32], selection: &Selection, rounded: bool, out: &mut [f32]) {
        let hidden = self.shape.hidden;
        match &self.shared {
            Some(shared) => shared.forward(workers, x, rounded, out),
            None => out.fill(0.0),
        }
        let busy: Vec<usize> = (0..self.experts.len()).filter(|&e| !selection.assigned[e].is_empty()).collect();
        let results = workers.map(busy, |expert| {
            let assigned = &selection.assigned[expert];
            let mut rows = Vec::with_capacity(assigned.len() * hidden);
            for &(token, _) in assigned {
                rows.extend_from_slice(&x[token * hidden..(token + 1) * hidden]);
            }
            let mut result = vec![0f32; rows.len()];
            self.experts[expert].forward_serial(&rows, rounded, &mut result);
            if rounded {
                round_bf16(&mut result);
            }
            (expert, result)
        });
        // In the order of the experts, so that the sum's rounding does not depend on the threads.
        for (expert, result) in results {
            for (&(token, weight), row) in selection.assigned[expert].iter().zip(result.chunks_exact(hidden)) {
                for (out, value) in out[token * hidden..(token + 1) * hidden].iter_mut().zip(row) {
                    *out += weight * value;
                }
            }
        }
    }
}

/// The k experts with the largest biased scores among the best groups, ascending; ties go to the lower number.
fn select(shape: &MoeShape, scores: &[f32], bias: &[f32]) -> Vec<u32> {
    largest(&eligible(shape, scores, bias).0, shape.top_k)
}

/// Biased scores, minus infinity outside the best groups; and the groups' totals, none where there is one group.
fn eligible(shape: &MoeShape, scores: &[f32], bias: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut totals = Vec::new();
    let mut biased: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
    if shape.groups > 1 {
        let size = shape.experts / shape.groups;
        totals = biased.chunks_exact(size).map(sum_of_two_largest).collect();
        let kept = largest(&totals, shape.top_groups);
        for (group, members) in biased.chunks_exact_mut(size).enumerate() {
            if !kept.contains(&(group as u32)) {
                members.fill(f32::NEG_INFINITY);
            }
        }
    }
    (biased, totals)
}

fn sum_of_two_largest(values: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &value in values {
        if value > first {
            (first, second) = (value, first);
        } else if value > second {
            second = value;
        }
    }
    first + second
}

/// Indices of the `count` largest values, ascending.
fn largest(values: &[f32], count: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| values[b as usize].total_cmp(&values[a as usize]).then(a.cmp(&b)));
    order.truncate(count);
    order.sort_unstable();
    order
}
