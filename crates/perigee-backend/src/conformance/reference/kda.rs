//! The KDA mixer as a recurrence, one token at a time, with the gate regimes that the suite draws: from no decay at all to
//! log decays of -80 in one step, and keys that repeat.

use crate::shapes::KdaShape;
use crate::weights::{DType, KdaWeights};

use super::super::draw::{Draw, Origin, Weight, WeightDraw, dot, round};
use super::{rms_norm, sigmoid, silu, softplus};

/// How a layer's gates are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gates {
    /// Every rate from none to -100 a step, by channel.
    Mixed,
    /// -80 in all channels at some tokens, none between: the case that a clamped or factored chunk gets wrong.
    Burst,
    /// About -80 at every token.
    Strong,
    /// No decay: the state keeps everything that is not overwritten.
    Open,
    /// No decay, equal keys and write strengths near 1: the case where an inverse by repeated squaring explodes.
    Repeat,
}

/// A KDA layer, drawn.
pub(crate) struct KdaLayer {
    pub(crate) shape: KdaShape,
    gates: Gates,
    /// What the first half of every input is in the [`Gates::Repeat`] regime.
    fixed: Vec<f64>,
    qkv_proj: [Weight; 3],
    qkv_conv: [Weight; 3],
    f_a_proj: Weight,
    f_b_proj: Weight,
    dt_bias: Weight,
    a_log: Weight,
    b_proj: Weight,
    g_a_proj: Weight,
    g_b_proj: Weight,
    o_norm: Weight,
    o_proj: Weight,
}

/// The state of one sequence in one layer.
#[derive(Debug, Clone)]
pub(crate) struct KdaState {
    /// [heads, D, D], key index first.
    pub(crate) recurrent: Vec<f64>,
    /// Of q, k and v: [heads, D, W - 1], oldest first.
    pub(crate) tails: [Vec<f64>; 3],
}

impl KdaState {
    /// The state of an empty sequence.
    pub(crate) fn empty(shape: &KdaShape) -> Self {
        let channels = shape.heads * shape.head_dim;
        Self {
            recurrent: vec![0.0; channels * shape.head_dim],
            tails: std::array::from_fn(|_| vec![0.0; channels * (shape.conv - 1)]),
        }
    }

    /// A state as some history may have left it, exactly as a backend stores it.
    pub(crate) fn drawn(shape: &KdaShape, draw: &mut Draw, activation: DType) -> Self {
        let channels = shape.heads * shape.head_dim;
        Self {
            recurrent: draw.normals(channels * shape.head_dim, 0.3, DType::Fp32),
            tails: std::array::from_fn(|_| draw.normals(channels * (shape.conv - 1), 1.0, activation)),
        }
    }
}

impl KdaLayer {
    /// Draws a layer. Rules cannot be edited, so with them only [`Gates::Mixed`] has an effect.
    pub(crate) fn draw(shape: KdaShape, gates: Gates, seed: u64, origin: Origin) -> Self {
        let (d, dim, channels) = (shape.hidden, shape.head_dim, shape.heads * shape.head_dim);
        let unit = |width: usize| (width as f64).powf(-0.5);
        let mut w = WeightDraw::new(seed, origin);
        let mut draw = Draw::new(seed ^ 0x5eed);
        let fixed = draw.normals(d / 2, 1.0, DType::Bf16);
        let mut layer = Self {
            shape,
            gates,
            fixed,
            qkv_proj: ["q_proj", "k_proj", "v_proj"].map(|name| w.normal(name, &[channels, d], unit(d))),
            qkv_conv: ["q_conv1d", "k_conv1d", "v_conv1d"].map(|name| w.normal(name, &[channels, shape.conv], 0.5)),
            f_a_proj: w.normal("f_a_proj", &[dim, d], unit(d)),
            f_b_proj: w.normal("f_b_proj", &[channels, dim], unit(dim)),
            dt_bias: w.uniform("dt_bias", &[channels], DType::Fp32, [-8.0, 5.0]),
            a_log: w.uniform("A_log", &[shape.heads], DType::Fp32, [0.0, 16.0_f64.ln()]),
            b_proj: w.normal("b_proj", &[shape.heads, d], 1.5 * unit(d)),
            g_a_proj: w.normal("g_a_proj", &[dim, d], unit(d)),
            g_b_proj: w.normal("g_b_proj", &[channels, dim], unit(dim)),
            o_norm: w.uniform("o_norm", &[dim], DType::Bf16, [0.5, 1.5]),
            o_proj: w.normal("o_proj", &[d, channels], unit(channels)),
        };
        if origin == Origin::Bytes {
            layer.set_gates();
        }
        layer
    }

    fn set_gates(&mut self) {
        let d = self.shape.hidden;
        match self.gates {
            Gates::Mixed => {}
            Gates::Strong => {
                self.dt_bias = self.dt_bias.edited(|bias| bias.fill(5.0));
                self.a_log = self.a_log.edited(|a_log| a_log.fill(16.0_f64.ln()));
                self.f_b_proj = self.f_b_proj.edited(|weight| weight.iter_mut().for_each(|w| *w *= 0.25));
            }
            Gates::Burst => {
                // z = 20 x[0] + small: the first input channel switches the decay of all channels.
                self.dt_bias = self.dt_bias.edited(|bias| bias.fill(0.0));
                self.a_log = self.a_log.edited(|a_log| a_log.fill(16.0_f64.ln()));
                self.f_a_proj = self.f_a_proj.edited(|weight| {
                    weight[..d].fill(0.0);
                    weight[0] = 4.0;
                });
                let rank = self.shape.head_dim;
                self.f_b_proj = self.f_b_proj.edited(|weight| {
                    weight.iter_mut().for_each(|w| *w *= 0.1);
                    weight.chunks_exact_mut(rank).for_each(|row| row[0] = 5.0);
                });
            }
            Gates::Open => self.dt_bias = self.dt_bias.edited(|bias| bias.fill(-30.0)),
            Gates::Repeat => {
                self.dt_bias = self.dt_bias.edited(|bias| bias.fill(-30.0));
                let fixed = self.fixed.clone();
                let blind = |weight: &mut [f64]| weight.chunks_exact_mut(d).for_each(|row| row[d / 2..].fill(0.0));
                self.qkv_proj[1] = self.qkv_proj[1].edited(blind);
                // beta = sigma(8) at every token, up to the rounding of the row.
                let scale = 8.0 / dot(&fixed, &fixed);
                self.b_proj = self.b_proj.edited(|weight| {
                    blind(weight);
                    for row in weight.chunks_exact_mut(d) {
                        row.iter_mut().zip(&fixed).for_each(|(w, x)| *w = scale * x);
                    }
                });
            }
        }
    }

    /// Inputs of `tokens` tokens, as the activation type holds them, that put the layer in its regime.
    pub(crate) fn inputs(&self, draw: &mut Draw, tokens: usize, activation: DType) -> Vec<f64> {
        let mut x = draw.normals(tokens * self.shape.hidden, 1.0, activation);
        for row in x.chunks_exact_mut(self.shape.hidden) {
            match self.gates {
                Gates::Burst => row[0] = if draw.below(7) == 0 { 0.25 } else { -1.0 },
                Gates::Repeat => {
                    row.iter_mut().zip(&self.fixed).for_each(|(x, &fixed)| *x = round(fixed, activation));
                }
                Gates::Mixed | Gates::Strong | Gates::Open => {}
            }
        }
        x
    }

    /// The layer's tensors as a backend loads them.
    pub(crate) fn weights(&self) -> KdaWeights<'_> {
        KdaWeights {
            qkv_proj: self.qkv_proj.each_ref().map(Weight::slice),
            qkv_conv: self.qkv_conv.each_ref().map(Weight::slice),
            f_a_proj: self.f_a_proj.slice(),
            f_b_proj: self.f_b_proj.slice(),
            dt_bias: self.dt_bias.slice(),
            a_log: self.a_log.slice(),
            b_proj: self.b_proj.slice(),
            g_a_proj: self.g_a_proj.slice(),
            g_b_proj: self.g_b_proj.slice(),
            o_norm: self.o_norm.slice(),
            o_proj: self.o_proj.slice(),
        }
    }

    /// Runs the tokens of x [tokens, d] one by one; advances the state and returns the output [tokens, d].
    pub(crate) fn run(&self, state: &mut KdaState, x: &[f64]) -> Vec<f64> {
        x.chunks_exact(self.shape.hidden).flat_map(|x| self.step(state, x)).collect()
    }

    fn step(&self, state: &mut KdaState, x: &[f64]) -> Vec<f64> {
        let dim = self.shape.head_dim;
        let [q, k, v]: [Vec<f64>; 3] = std::array::from_fn(|i| {
            let inputs = self.qkv_proj[i].apply(x);
            convolve(&self.qkv_conv[i].values, self.shape.conv, &mut state.tails[i], &inputs)
        });
        let decay = self.log_decay(x);
        let beta: Vec<f64> = self.b_proj.apply(x).into_iter().map(sigmoid).collect();
        let gate = self.g_b_proj.apply(&self.g_a_proj.apply(x));
        let mut y = Vec::with_capacity(q.len());
        for (head, &beta) in beta.iter().enumerate() {
            let channels = head * dim..(head + 1) * dim;
            let q: Vec<f64> = unit(&q[channels.clone()]).into_iter().map(|q| q * (dim as f64).powf(-0.5)).collect();
            let k = unit(&k[channels.clone()]);
            let memory = &mut state.recurrent[head * dim * dim..(head + 1) * dim * dim];
            let o = delta_rule(memory, &q, &k, &v[channels.clone()], &decay[channels.clone()], beta);
            let normed = rms_norm(&o, &self.o_norm.values, f64::from(self.shape.eps));
            y.extend(normed.iter().zip(&gate[channels]).map(|(o, gate)| o * sigmoid(*gate)));
        }
        self.o_proj.apply(&y)
    }

    /// g [P]: the log decay of every key channel.
    pub(crate) fn log_decay(&self, x: &[f64]) -> Vec<f64> {
        let z = self.f_b_proj.apply(&self.f_a_proj.apply(x));
        let dim = self.shape.head_dim;
        let rate = |channel: usize| self.a_log.values[channel / dim].exp();
        z.iter().zip(&self.dt_bias.values).enumerate().map(|(c, (z, bias))| -rate(c) * softplus(z + bias)).collect()
    }
}

/// silu of the causal depthwise convolution, for one token; shifts the tail [P, W - 1]. The last tap is the current token's.
fn convolve(taps: &[f64], width: usize, tail: &mut [f64], inputs: &[f64]) -> Vec<f64> {
    let kept = width - 1;
    let channel = |(j, &input): (usize, &f64)| {
        let (taps, tail) = (&taps[j * width..(j + 1) * width], &mut tail[j * kept..(j + 1) * kept]);
        let sum = dot(&taps[..kept], tail) + taps[kept] * input;
        if kept > 0 {
            tail.rotate_left(1);
            tail[kept - 1] = input;
        }
        silu(sum)
    };
    inputs.iter().enumerate().map(channel).collect()
}

/// x / sqrt(sum x^2 + 1e-6).
fn unit(x: &[f64]) -> Vec<f64> {
    let factor = 1.0 / (dot(x, x) + 1e-6).sqrt();
    x.iter().map(|x| x * factor).collect()
}

/// One step of the gated delta rule on S [D, D]: decay, correct towards v, write, read.
fn delta_rule(memory: &mut [f64], q: &[f64], k: &[f64], v: &[f64], decay: &[f64], beta: f64) -> Vec<f64> {
    let dim = v.len();
    let mut delta = v.to_vec();
    for (row, (k, g)) in memory.chunks_exact_mut(dim).zip(k.iter().zip(decay)) {
        row.iter_mut().for_each(|s| *s *= g.exp());
        delta.iter_mut().zip(row).for_each(|(delta, s)| *delta -= k * *s);
    }
    let mut o = vec![0.0; dim];
    for (row, (k, q)) in memory.chunks_exact_mut(dim).zip(k.iter().zip(q)) {
        row.iter_mut().zip(&delta).for_each(|(s, delta)| *s += k * beta * delta);
        o.iter_mut().zip(row).for_each(|(o, s)| *o += q * *s);
    }
    o
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delta_rule_by_hand() {
        // S = [[1, 2], [3, 4]], decay halves row 0: S' = [[.5, 1], [3, 4]]. k = (1, 0) reads (.5, 1); v = (1, 0), beta 1/2:
        // delta = (.25, -.5); S = [[.75, .5], [3, 4]]; q = (2, 1) reads (4.5, 5).
        let mut memory = vec![1.0, 2.0, 3.0, 4.0];
        let o = delta_rule(&mut memory, &[2.0, 1.0], &[1.0, 0.0], &[1.0, 0.0], &[-(2.0_f64.ln()), 0.0], 0.5);
        assert_eq!(memory, vec![0.75, 0.5, 3.0, 4.0]);
        assert_eq!(o, vec![4.5, 5.0]);
    }

    #[test]
    fn the_last_tap_is_the_current_token() {
        let mut tail = vec![1.0, 2.0];
        let out = convolve(&[100.0, 10.0, 1.0], 3, &mut tail, &[3.0]);
        assert_eq!(out, vec![silu(123.0)]);
        assert_eq!(tail, vec![2.0, 3.0]);
    }

    #[test]
    fn regimes_reach_the_decays_they_name() {
        let shape = KdaShape { hidden: 64, heads: 2, head_dim: 32, conv: 4, eps: 1e-5 };
        let decays = |gates| {
            let layer = KdaLayer::draw(shape, gates, 3, Origin::Bytes);
            let x = layer.inputs(&mut Draw::new(4), 100, DType::Bf16);
            x.chunks_exact(64).flat_map(|x| layer.log_decay(x)).collect::<Vec<_>>()
        };
        let least = |g: &[f64]| g.iter().copied().fold(0.0, f64::min);
        let most = |g: &[f64]| g.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        assert!(least(&decays(Gates::Open)) > -1e-6);
        assert!(least(&decays(Gates::Repeat)) > -1e-6);
        assert!(least(&decays(Gates::Mixed)) < -20.0 && most(&decays(Gates::Mixed)) > -0.01);
        assert!(most(&decays(Gates::Strong)) < -60.0 && least(&decays(Gates::Strong)) < -80.0);
        let burst = decays(Gates::Burst);
        assert!(least(&burst) < -75.0 && !burst.iter().any(|g| (-60.0..=-1e-3).contains(g)));
    }

    #[test]
    fn repeated_keys_are_equal_and_strongly_written() {
        let shape = KdaShape { hidden: 64, heads: 1, head_dim: 32, conv: 4, eps: 1e-5 };
        let layer = KdaLayer::draw(shape, Gates::Repeat, 3, Origin::Bytes);
        let x = layer.inputs(&mut Draw::new(4), 2, DType::Bf16);
        let (first, second) = x.split_at(64);
        assert_eq!(layer.qkv_proj[1].apply(first), layer.qkv_proj[1].apply(second));
        assert_ne!(layer.qkv_proj[2].apply(first), layer.qkv_proj[2].apply(second));
        assert!(sigmoid(layer.b_proj.apply(first)[0]) > 0.999);
    }
}
