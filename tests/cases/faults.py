"""Typical mistakes in the formulas, each planted in the float64 reference: does the comparison notice them?

Run as a script it prints how far each mistake moves the logits of each case, the table of README.md. The tests use the
same classes to show that compare.py fails on every one.
"""
import pathlib

import numpy as np
from safetensors.numpy import load_file

import reference
from reference import Model, rms_norm, silu

CASES = ("tiny", "q_lora", "first_mla", "groups")


class OutputNormEps(Model):
    """o_norm eps 1e-6 for 1e-5"""

    def __init__(self, config, weights):
        super().__init__(config, weights)
        self.o_norm_eps = 1e-6


class DecayAfterRead(Model):
    """decay after the delta read"""

    def delta_rule(self, state, q, k, v, log_decay, beta):
        delta = beta * (v - np.einsum("hk,hkv->hv", k, state))
        state = np.exp(log_decay)[:, :, None] * state + k[:, :, None] * delta[:, None, :]
        return state, np.einsum("hk,hkv->hv", q, state)


class BiasedWeights(Model):
    """expert weights from biased scores"""

    def routing_weights(self, scores, bias, chosen):
        return super().routing_weights(scores + bias, bias, chosen)


class UnbiasedSelection(Model):
    """selection without bias"""

    def selection_bias(self, bias):
        return np.zeros_like(bias)


class NoQueryScale(Model):
    """no q scale"""

    def __init__(self, config, weights):
        super().__init__(config, weights)
        self.q_scale = 1.0


class SoftmaxScale(Model):
    """softmax scale from nope only"""

    def __init__(self, config, weights):
        super().__init__(config, weights)
        self.softmax_scale = self.nope ** -0.5


class Rotary(Model):
    """rotary applied"""

    def position(self, query, rope_key, position):
        frequency = self.config["rope_theta"] ** (-np.arange(0, self.rope, 2) / self.rope)
        turn = np.exp(1j * position * frequency)

        def rotate(x):
            turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
            return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

        return np.concatenate([query[:, :self.nope], rotate(query[:, self.nope:])], axis=1), rotate(rope_key)


class ReversedTaps(Model):
    """conv taps reversed"""

    def convolution_taps(self, prefix):
        return super().convolution_taps(prefix)[::-1]


class SiluGate(Model):
    """silu for the output gate's sigmoid"""

    def output_gate(self, gate):
        return silu(gate)


class RoundedState(Model):
    """state rounded to bf16 every step"""

    def delta_rule(self, *inputs):
        state, out = super().delta_rule(*inputs)
        bits = state.astype(np.float32).view(np.uint32)
        nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
        return (nearest_even & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64), out


class NoQueryNorm(Model):
    """low-rank query not normed"""

    def query_norm(self, low_rank, weight):
        return low_rank


class NoGroups(Model):
    """expert groups ignored"""

    def select(self, biased):
        return Model(self.config | {"num_expert_group": 1, "topk_group": 1}, {}).select(biased)


class GroupMaximum(Model):
    """group score from the best expert alone"""

    def group_scores(self, grouped):
        return grouped.max(axis=1)


class AlwaysRenormalised(Model):
    """renormalised although the configuration says no"""

    def routing_weights(self, scores, bias, chosen):
        return scores[chosen] / scores[chosen].sum() * self.config["routed_scaling_factor"]


EVERYWHERE = (OutputNormEps, DecayAfterRead, BiasedWeights, UnbiasedSelection, NoQueryScale, SoftmaxScale, Rotary,
              ReversedTaps, SiluGate, RoundedState)
ONLY_IN = {NoQueryNorm: "q_lora", NoGroups: "groups", GroupMaximum: "groups", AlwaysRenormalised: "groups"}


def main():
    folder = pathlib.Path(__file__).parent
    print(f"| mistake | {' | '.join(CASES)} |\n|{'---|' * (len(CASES) + 1)}")
    for fault in (*EVERYWHERE, *ONLY_IN):
        cells = []
        for case in CASES:
            if ONLY_IN.get(fault, case) != case:
                cells.append("-")
                continue
            expected = load_file(folder / case / "expected.safetensors")
            out, _ = reference.run(fault(*reference.read_checkpoint(folder / case)), expected)
            cells.append(f"{reference.worst_errors(out, expected)['logits']:.2g}")
        print(f"| {fault.__doc__} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
