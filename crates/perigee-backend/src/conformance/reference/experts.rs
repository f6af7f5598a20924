//! The gated MLP and the mixture of experts, expert by expert, with the router's choice and how close it was.

use crate::shapes::{MlpShape, MoeShape};
use crate::weights::{DType, MlpWeights, MoeWeights};

use super::super::draw::{Draw, Origin, Weight, WeightDraw};
use super::{sigmoid, silu};

/// A gated MLP, drawn.
pub(crate) struct MlpLayer {
    gate: Weight,
    up: Weight,
    down: Weight,
}

impl MlpLayer {
    pub(crate) fn draw(shape: MlpShape, seed: u64, origin: Origin) -> Self {
        Self::named("mlp", shape, &mut WeightDraw::new(seed, origin))
    }

    fn named(prefix: &str, shape: MlpShape, w: &mut WeightDraw) -> Self {
        let (d, width) = (shape.hidden, shape.width);
        let unit = |width: usize| (width as f64).powf(-0.5);
        Self {
            gate: w.normal(&format!("{prefix}.gate_proj"), &[width, d], unit(d)),
            up: w.normal(&format!("{prefix}.up_proj"), &[width, d], unit(d)),
            down: w.normal(&format!("{prefix}.down_proj"), &[d, width], unit(width)),
        }
    }

    pub(crate) fn weights(&self) -> MlpWeights<'_> {
        MlpWeights { gate: self.gate.slice(), up: self.up.slice(), down: self.down.slice() }
    }

    /// (silu(x g^T) . (x u^T)) d^T for one token.
    pub(crate) fn run(&self, x: &[f64]) -> Vec<f64> {
        let gated: Vec<f64> =
            self.gate.apply(x).into_iter().zip(self.up.apply(x)).map(|(gate, up)| silu(gate) * up).collect();
        self.down.apply(&gated)
    }
}

/// How the selection bias is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bias {
    /// Small, of both signs: changes some choices.
    Mixed,
    /// All so negative that every biased score is below zero: a masked group must not win with a zero.
    Negative,
    /// Expert 1 always chosen, expert 0 never.
    Lopsided,
}

/// A mixture of experts, drawn.
pub(crate) struct MoeLayer {
    pub(crate) shape: MoeShape,
    router: Weight,
    bias: Weight,
    experts: Vec<MlpLayer>,
    shared: Option<MlpLayer>,
}

/// A router's choice for one token.
pub(crate) struct Choice {
    /// The experts, ascending.
    pub(crate) experts: Vec<u32>,
    /// The smallest difference that decided it: between kept and dropped groups, between chosen and refused experts.
    pub(crate) gap: f64,
}

impl MoeLayer {
    pub(crate) fn draw(shape: MoeShape, bias: Bias, seed: u64, origin: Origin) -> Self {
        let mut w = WeightDraw::new(seed, origin);
        let expert = MlpShape { hidden: shape.hidden, width: shape.width };
        let range = if bias == Bias::Negative { [-3.0, -1.5] } else { [-0.3, 0.3] };
        let mut layer = Self {
            shape,
            router: w.normal("gate", &[shape.experts, shape.hidden], (shape.hidden as f64).powf(-0.5)),
            bias: w.uniform("e_score_correction_bias", &[shape.experts], DType::Fp32, range),
            experts: (0..shape.experts).map(|e| MlpLayer::named(&format!("experts.{e}"), expert, &mut w)).collect(),
            shared: (shape.shared_width > 0).then(|| {
                let shared = MlpShape { hidden: shape.hidden, width: shape.shared_width };
                MlpLayer::named("shared_experts", shared, &mut w)
            }),
        };
        if bias == Bias::Lopsided {
            layer.bias = layer.bias.edited(|bias| (bias[0], bias[1]) = (-10.0, 10.0));
        }
        layer
    }

    pub(crate) fn weights(&self) -> MoeWeights<'_> {
        MoeWeights {
            router: self.router.slice(),
            bias: self.bias.slice(),
            experts: self.experts.iter().map(MlpLayer::weights).collect(),
            shared: self.shared.as_ref().map(MlpLayer::weights),
        }
    }

    /// Inputs, redrawn token by token until no choice hangs on less than 1e-5: ties are the implementation's to break.
    pub(crate) fn inputs(&self, draw: &mut Draw, tokens: usize, activation: DType) -> Vec<f64> {
        let mut x = Vec::with_capacity(tokens * self.shape.hidden);
        while x.len() < tokens * self.shape.hidden {
            let token = draw.normals(self.shape.hidden, 1.0, activation);
            if self.choose(&token).gap > 1e-5 {
                x.extend(token);
            }
        }
        x
    }

    fn scores(&self, x: &[f64]) -> Vec<f64> {
        self.router.apply(x).into_iter().map(sigmoid).collect()
    }

    /// The layer's own choice.
    pub(crate) fn choose(&self, x: &[f64]) -> Choice {
        let biased: Vec<f64> = self.scores(x).iter().zip(&self.bias.values).map(|(s, b)| s + b).collect();
        choose(&biased, &self.shape)
    }

    /// What would be chosen if the bias were left out.
    pub(crate) fn choose_unbiased(&self, x: &[f64]) -> Choice {
        choose(&self.scores(x), &self.shape)
    }

    /// The output for one token with these experts.
    pub(crate) fn run(&self, x: &[f64], experts: &[u32]) -> Vec<f64> {
        let scores = self.scores(x);
        let sum: f64 = experts.iter().map(|&e| scores[e as usize]).sum();
        let mut out = self.shared.as_ref().map_or_else(|| vec![0.0; self.shape.hidden], |shared| shared.run(x));
        for &e in experts {
            let share = if self.shape.renormalize { scores[e as usize] / (sum + 1e-20) } else { scores[e as usize] };
            let weight = share * f64::from(self.shape.scale);
            out.iter_mut().zip(self.experts[e as usize].run(x)).for_each(|(out, y)| *out += weight * y);
        }
        out
    }
}

/// Keeps the best groups by the sum of their two best scores, then the best experts among them.
fn choose(biased: &[f64], shape: &MoeShape) -> Choice {
    let size = shape.experts / shape.groups;
    let group_score = |group: usize| {
        let mut scores = biased[group * size..(group + 1) * size].to_vec();
        scores.sort_by(|a, b| b.total_cmp(a));
        scores.iter().take(2).sum::<f64>()
    };
    let groups: Vec<(usize, f64)> = (0..shape.groups).map(|group| (group, group_score(group))).collect();
    let (kept, group_gap) = best(groups, shape.top_groups);
    let candidates = kept.iter().flat_map(|&group| group * size..(group + 1) * size).map(|e| (e, biased[e])).collect();
    let (mut experts, expert_gap) = best(candidates, shape.top_k);
    experts.sort_unstable();
    Choice { experts: experts.into_iter().map(|e| e as u32).collect(), gap: group_gap.min(expert_gap) }
}

/// The `count` items of the largest scores, and by how much the last of them beats the next.
fn best(mut items: Vec<(usize, f64)>, count: usize) -> (Vec<usize>, f64) {
    items.sort_by(|a, b| b.1.total_cmp(&a.1));
    let gap = items.get(count).map_or(f64::INFINITY, |next| items[count - 1].1 - next.1);
    (items.into_iter().take(count).map(|item| item.0).collect(), gap)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> MoeShape {
        MoeShape {
            hidden: 16,
            experts: 6,
            top_k: 2,
            groups: 3,
            top_groups: 2,
            renormalize: true,
            scale: 2.0,
            width: 8,
            shared_width: 0,
        }
    }

    #[test]
    fn groups_are_kept_by_the_sum_of_their_two_best() {
        // Group sums 1.0, 1.1, 1.2: the group of the single best expert (0.9) is dropped.
        let choice = choose(&[0.9, 0.1, 0.5, 0.6, 0.8, 0.4], &shape());
        assert_eq!(choice.experts, vec![3, 4]);
        assert!((choice.gap - 0.1).abs() < 1e-12, "{}", choice.gap);
    }

    #[test]
    fn dropped_groups_do_not_come_back_when_scores_are_negative() {
        let choice = choose(&[-9.0, -9.0, -1.0, -2.0, -1.5, -3.0], &shape());
        assert_eq!(choice.experts, vec![2, 4]);
    }

    #[test]
    fn weights_come_from_unbiased_scores() {
        let layer = MoeLayer::draw(shape(), Bias::Lopsided, 1, Origin::Bytes);
        let x = layer.inputs(&mut Draw::new(2), 1, DType::Fp32);
        assert!(layer.choose(&x).experts.contains(&1) && !layer.choose(&x).experts.contains(&0));
        // One expert: its renormalised weight is 1, so twice its own output.
        let alone = layer.run(&x, &[4]);
        for (found, y) in alone.iter().zip(layer.experts[4].run(&x)) {
            assert!((found - 2.0 * y).abs() < 1e-12);
        }
    }

    #[test]
    fn a_mixed_bias_changes_choices() {
        let layer = MoeLayer::draw(shape(), Bias::Mixed, 1, Origin::Bytes);
        let x = layer.inputs(&mut Draw::new(2), 40, DType::Fp32);
        let changed = x.chunks_exact(16).filter(|x| layer.choose(x).experts != layer.choose_unbiased(x).experts);
        assert!(changed.count() > 2);
    }
}
