"""The KDA kernels beside flash-linear-attention's (PyPI fla-core, Triton) on one card and in one run.

Prefill of one prompt and decode of a batch at the 48B shape: 32 heads of 128, bfloat16 in and out, float32 state. Both sides take
q, k and v after their projections, norm them, and compute gates and write strengths. Ours also does the short convolutions and
the gated output norm, which fla has in kernels of their own that are not timed here: for prompts the first ratio is of the same work,
the second with those two in our time. Ours works through longer prompts in steps of 8,192 tokens, as a replica does. Medians;
prints a line and the ratio, fla's time over ours, for each size. Most of the time goes into Triton's choice of configurations.

usage: python3 tests/bench/fla_kda.py BENCH_OPS   (the example bench_ops of perigee-cuda, built for release)
"""
import re
import subprocess
import sys

import torch
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from triton.testing import do_bench

HEADS, DIM = 32, 128
PROMPTS = [64, 256, 1024, 4096, 8192, 16384, 32768, 65536]
BATCHES = [64, 256]
STEP = 8192


def ours(program):
    out = subprocess.run([program, "kda"], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^(kda_kernels|kda_chunks) +(\d+) x (\d+) after (\d+) +([0-9.]+) ms", out, re.MULTILINE)
    return {(what, *map(int, size)): float(ms) for what, *size, ms in found}


@torch.no_grad()
def theirs(rows, tokens):
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    uniform = torch.rand(HEADS + HEADS * DIM, device="cuda", generator=generator)
    inputs = {name: normal(rows, tokens, HEADS, DIM) for name in ("q", "k", "v", "g")}
    inputs |= {"beta": normal(rows, tokens, HEADS), "A_log": uniform[:HEADS] * 2.77, "dt_bias": uniform[HEADS:] * 4.6 - 6.9,
               "initial_state": torch.zeros(rows, HEADS, DIM, DIM, device="cuda"), "output_final_state": True,
               "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
    kernel = chunk_kda if tokens > 1 else fused_recurrent_kda
    return do_bench(lambda: kernel(**inputs), warmup=50, rep=200, return_mode="median")


def main():
    own = ours(sys.argv[1])
    print(torch.cuda.get_device_name(0))
    for tokens in PROMPTS:
        steps = max(tokens // STEP, 1)
        chunks, kernels = (steps * own[what, 1, min(tokens, STEP), 0] for what in ("kda_chunks", "kda_kernels"))
        peer = theirs(1, tokens)
        print(f"1 x {tokens:6} tokens: {chunks:8.4f} ms, with convolution and norm {kernels:8.4f} ms, fla {peer:8.4f} ms, "
              f"ratio {peer / chunks:.2f} and {peer / kernels:.2f}", flush=True)
    for rows in BATCHES:
        mine, peer = own["kda_kernels", rows, 1, 1023], theirs(rows, 1)
        print(f"{rows:3} x 1 token: {mine:8.4f} ms, fla {peer:8.4f} ms, ratio {peer / mine:.2f}", flush=True)


if __name__ == "__main__":
    main()
