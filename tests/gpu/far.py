"""A context of a million positions on a card: the logits behind it are the same whichever kernels attend. All but the end of the
prompt is filled in, alike in every run, with latents such that keys count that lie anywhere. The end is scored as one chunk, in the
expanded form of attention, and again in chunks that are too short for that, with the experts of the first run; so rounding differs,
and nothing else. Of 256 experts a router in bfloat16 chooses others for every token in some layer, which moves logits several times
as far. A run over half of the context must give something else: then keys that one form left out would show.

usage: far.py PERIGEE [POSITIONS [MODEL [DEVICE]]]   (default 1048576 of random:48b on cuda; on CPUs there is one form, and what is
compared is how the end is cut)
"""
import pathlib
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file
from scored import LIMIT, distance, is_near, score

COMPUTED, FED = 512, 8
# Tokens of a step: the whole end at once, or less than the expanded form takes.
EXPANDED, ABSORBED = 8192, 192
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
    fine = [is_near(name, found[name], expected[name]) for name in NAMES]
    moved = [distance(half[name], expected[name]) for name in NAMES]
    print(f"half of the context: relative L2 {moved[0]:.4f} and {moved[1]:.4f} (more than {LIMIT})")
    assert all(fine) and min(moved) > LIMIT


if __name__ == "__main__":
    main()
