"""Logits of the 48B shape in bfloat16 against float32 activations and products over the same bfloat16 weights: a prompt and fed
tokens, with the experts of the float32 run in both. Rounding differs, and nothing else.

usage: logits48.py PERIGEE [MODEL]   (default random:48b)
"""
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
from safetensors.numpy import load_file, save_file

PROMPT, FED, TOP, LIMIT, MARGIN = 256, 32, 160_000, 0.08, 0.2


def score(binary, model, dtype, folder, *options):
    """What `perigee score` writes for the tokens in the folder."""
    out = folder / f"{dtype}.safetensors"
    line = [binary, "score", "--model", model, "--device", "cuda", "--dtype", dtype, "--tokens", folder / "tokens.safetensors",
            "--feed", folder / "tokens.safetensors", "--out", out, *options]
    began = time.monotonic()
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{dtype}: {time.monotonic() - began:.1f} s")
    return out


def differ(name, found, expected):
    """Compares logits [tokens, V]; true where they are within the limits."""
    off = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    best = np.sort(expected, axis=-1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > MARGIN
    same = found.argmax(-1) == expected.argmax(-1)
    print(f"{name}: relative L2 {off:.4f} (limit {LIMIT}), top-1 equal at {int((same & clear).sum())} of {int(clear.sum())} "
          f"positions with a margin above {MARGIN}, at {int(same.sum())} of {len(same)} of all")
    return np.isfinite(found).all() and off <= LIMIT and bool(same[clear].all())


def main():
    binary, model = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "random:48b"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        draw = np.random.default_rng(48)
        save_file({"prompt_0": draw.integers(100, TOP, PROMPT), "greedy_0": draw.integers(100, TOP, FED)},
                  folder / "tokens.safetensors")
        exact = score(binary, model, "fp32", folder, "--trace")
        rounded = score(binary, model, "bf16", folder, "--experts", exact)
        expected, found = load_file(exact), load_file(rounded)
    names = ["logits_0", "greedy_logits_0"]
    assert [len(expected[name]) for name in names] == [PROMPT, FED]
    assert all([differ(name, found[name], expected[name]) for name in names])


if __name__ == "__main__":
    main()
