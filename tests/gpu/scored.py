"""`perigee score` for the checks of this folder, and how its logits are compared where two runs differ in rounding alone."""
import subprocess
import time

import numpy as np


def score(binary, model, title, folder, *options):
    """Scores the tokens in the folder, a prompt and tokens to feed behind it; the file that was written."""
    tokens, out = folder / "tokens.safetensors", folder / f"{title.replace(' ', '-')}.safetensors"
    line = [binary, "score", "--model", model, "--tokens", tokens, "--feed", tokens, "--out", out, *options]
    began = time.monotonic()
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{title}: {time.monotonic() - began:.1f} s")
    return out


def distance(found, expected):
    """Relative L2 of logits [tokens, V]."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def is_near(name, found, expected, limit, margin):
    """Compares logits [tokens, V]: their relative L2, and the likeliest token where it leads by a margin; true where they are near."""
    off = distance(found, expected)
    best = np.sort(expected, axis=-1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > margin
    same = found.argmax(-1) == expected.argmax(-1)
    print(f"{name}: relative L2 {off:.4f} (limit {limit}), top-1 equal at {int((same & clear).sum())} of {int(clear.sum())} "
          f"positions with a margin above {margin}, at {int(same.sum())} of {len(same)} of all")
    return bool(np.isfinite(found).all()) and off <= limit and bool(same[clear].all())
