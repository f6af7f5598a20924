"""A context of a million positions on a card: what is drawn behind it is the same whichever kernels attend. All but the end of the
prompt is filled in, alike in every run; the end is computed as one chunk, in the expanded form of attention, and in chunks that are too
short for that. The latents are such that keys count that lie anywhere.

usage: far.py PERIGEE [POSITIONS [MODEL]]   (default 1048576 of random:48b)
"""
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
from cluster import Cluster

# The limit is that of golden cases in bfloat16; experts are not forced here, so a lead must be as great.
COMPUTED, DRAWN, TOP, LIMIT, MARGIN = 512, 4, 20, 0.4, 0.4
# Tokens of a step: the whole end at once, or less than the expanded form takes.
EXPANDED, ABSORBED = 8192, 192


def answer(binary, model, tokens, positions, budget):
    """The drawn tokens, and at each of them the likeliest ones with their log-probabilities."""
    with Cluster(binary, model, "cuda", "--replicas", 1, "--tp", 1, "--state-slots", 1, "--max-batch", 1, "--token-budget", budget,
                 "--latent-pages", positions // 64 + 2, "--max-model-len", positions + DRAWN,
                 f"--fill-prompts={positions - COMPUTED}", dtype="bf16") as replica:
        choice = replica.ask("generate", "--tokens-from", tokens, "--max-tokens", DRAWN, "--temperature", 0, "--logprobs", TOP,
                             "--ignore-eos")["choices"][0]
    return choice["tokens"], [dict(map(tuple, top)) for top in choice["logprobs"]]


def differ(found, expected):
    """Compares two answers as far as they drew the same; true where they are within the limits."""
    fine = True
    for at in range(DRAWN):
        both = sorted(found[1][at].keys() & expected[1][at].keys())
        mine, right = (np.array([logprobs[token] for token in both]) for logprobs in (found[1][at], expected[1][at]))
        best = sorted(expected[1][at].values())[-2:]
        margin, off = best[1] - best[0], np.abs(mine - right).max(initial=0 if both else np.inf)
        print(f"token {at}: {found[0][at]} and {expected[0][at]}, margin {margin:.3f}; {len(both)} of the {TOP} likeliest in both, "
              f"log-probabilities off by at most {off:.3f} (limit {LIMIT})")
        fine &= bool(np.isfinite(off)) and off <= LIMIT and 2 * len(both) >= TOP
        if found[0][at] != expected[0][at]:
            return fine and margin <= MARGIN
    return fine


def main():
    binary, positions = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1 << 20
    model, found = sys.argv[3] if len(sys.argv) > 3 else "random:48b", []
    with tempfile.TemporaryDirectory() as folder:
        tokens = pathlib.Path(folder, "tokens")
        tokens.write_text(",".join(str(100 + at * 7919 % 159_000) for at in range(positions)))
        for budget in (EXPANDED, ABSORBED):
            began = time.monotonic()
            found.append(answer(binary, model, tokens, positions, budget))
            print(f"steps of {budget} tokens: {time.monotonic() - began:.1f} s")
    assert differ(*found)


if __name__ == "__main__":
    main()
