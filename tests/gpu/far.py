"""A context of a million positions on a card: the logits behind it are the same whichever kernels attend. All but the end of the
prompt is filled in, alike in every run, with latents such that keys count that lie anywhere. The end is scored as one chunk, in the
expanded form of attention, and again in chunks that are too short for that, with the experts of the first run; so rounding differs,
and nothing else. (A router that chooses freely chooses other experts for every token in some layer as soon as anything is rounded
otherwise, and moves logits ten times as far.) A run over half of the context must give something else: keys that a form left out
would show.

usage: far.py PERIGEE [POSITIONS [MODEL [DEVICE]]]   (default 1048576 of random:48b on cuda; a CPU has one form, so there it is shown
how much the way in which the end is cut matters)
"""
import pathlib
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file
from scored import distance, is_near, score

COMPUTED, FED = 256, 8
# Tokens of a step: the whole end at once, or less than the expanded form takes.
EXPANDED, ABSORBED = 8192, 192
# logits48.py saw 0.03 between bfloat16 and float32. Behind filled latents, whose softmax is peaked, rounding shows 3.2 to 4.3 times as
# much (27 layers with 256 experts of 32 channels, hidden width 256, on a CPU: 0.017 without; 0.073, 0.065 and 0.057 behind 1k, 4k and
# 16k), and here both sides are rounded: apart by the root of 2 of 0.1 to 0.13. The margin is to the limit as in logits48.py.
LIMIT, MARGIN = 0.15, 0.4
# How many times as far half of the context is.
APART = 3
NAMES = ["logits_0", "greedy_logits_0"]


def ids(count, seed):
    """Ids that the vocabulary of any model has."""
    return np.random.default_rng(seed).integers(3, 250, count)


def logits(binary, model, device, positions, chunk, folder, experts=None):
    """Scores the end of a context; the logits, and the file that has them and the experts."""
    end = {"prompt_0": ids(COMPUTED, 1), "greedy_0": ids(FED, 2)}
    # What is filled in does not depend on its tokens.
    end["prompt_0"] = np.concatenate([np.full(positions - COMPUTED, 3), end["prompt_0"]])
    save_file(end, folder / "tokens.safetensors")
    forced = ["--experts", experts] if experts else ["--trace"]
    out = score(binary, model, f"{positions} positions in steps of {chunk}", folder, "--device", device, "--dtype", "bf16",
                "--chunk", chunk, f"--fill-prompts={positions - COMPUTED}", *forced)
    found = load_file(out)
    assert [len(found[name]) for name in NAMES] == [COMPUTED, FED], [found[name].shape for name in NAMES]
    return {name: found[name] for name in NAMES}, out


def main():
    binary, positions = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1 << 20
    model = sys.argv[3] if len(sys.argv) > 3 else "random:48b"
    device = sys.argv[4] if len(sys.argv) > 4 else "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        expected, experts = logits(binary, model, device, positions, EXPANDED, folder)
        found, _ = logits(binary, model, device, positions, ABSORBED, folder, experts)
        half, _ = logits(binary, model, device, positions // 2, ABSORBED, folder, experts)
    fine = [is_near(name, found[name], expected[name], LIMIT, MARGIN) for name in NAMES]
    for name in NAMES:
        least, moved = APART * distance(found[name], expected[name]), distance(half[name], expected[name])
        print(f"{name} of half of the context: relative L2 {moved:.4f} (more than {least:.4f})")
        fine.append(moved > least)
    assert all(fine)


if __name__ == "__main__":
    main()
