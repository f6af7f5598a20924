"""Logits of the 48B shape in bfloat16 against float32 activations and products over the same bfloat16 weights: a prompt and fed
tokens, with the experts of the float32 run in both. Rounding differs, and nothing else.

usage: logits48.py PERIGEE [MODEL]   (default random:48b)
"""
import pathlib
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file
from scored import is_near, score

PROMPT, FED, TOP = 256, 32, 160_000
# Golden cases of 7 layers have 4e-2; 27 round more.
LIMIT, MARGIN = 0.08, 0.2


def main():
    binary, model = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "random:48b"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        draw = np.random.default_rng(48)
        save_file({"prompt_0": draw.integers(100, TOP, PROMPT), "greedy_0": draw.integers(100, TOP, FED)},
                  folder / "tokens.safetensors")
        exact = score(binary, model, "fp32", folder, "--device", "cuda", "--dtype", "fp32", "--trace")
        rounded = score(binary, model, "bf16", folder, "--device", "cuda", "--dtype", "bf16", "--experts", exact)
        expected, found = load_file(exact), load_file(rounded)
    names = ["logits_0", "greedy_logits_0"]
    assert [len(expected[name]) for name in names] == [PROMPT, FED]
    assert all([is_near(name, found[name], expected[name], LIMIT, MARGIN) for name in names])


if __name__ == "__main__":
    main()
