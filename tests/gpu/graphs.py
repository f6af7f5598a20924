"""Recorded decode steps against the same steps run op by op: `perigee score` feeds the expected tokens of a golden case with and
without a trace, which a recording cannot give. usage: graphs.py PERIGEE CASE fp32|bf16"""
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file

# Relative L2 of the fed tokens' logits. In bf16 a padded product may round otherwise, and experts may flip: the median prompt counts.
LIMITS = {"fp32": (np.max, 1e-5), "bf16": (np.median, 3e-2)}


def fed_logits(binary, case, dtype, folder, *options):
    """The logits of fed tokens by name, and what was logged."""
    out = pathlib.Path(folder, "out.safetensors")
    expected = case / "expected.safetensors"
    line = [binary, "score", "--model", case, "--tokens", expected, "--feed", expected, "--out", out, "--device", "cuda",
            "--dtype", dtype, *options]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PERIGEE_LOG": "perigee_cuda=debug"})
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: values for name, values in load_file(out).items() if name.startswith("greedy_logits_")}, done.stderr


def main():
    binary, case, dtype = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
    with tempfile.TemporaryDirectory() as folder:
        whole, log = fed_logits(binary, case, dtype, folder)
        single, trace_log = fed_logits(binary, case, dtype, folder, "--trace")
    recorded = log.count("recorded a decode step")
    assert recorded > 0, "no decode step was recorded"
    assert "recorded a decode step" not in trace_log, "a traced step was recorded"
    assert whole.keys() == single.keys() and whole, "fed logits are missing"
    off = [np.linalg.norm(whole[name] - single[name]) / np.linalg.norm(single[name]) for name in single]
    judge, limit = LIMITS[dtype]
    print(f"{case.name} {dtype}: {recorded} sizes recorded, logits off by {judge(off):.2e} (limit {limit:.0e}), worst {max(off):.2e}")
    assert np.isfinite(off).all() and judge(off) <= limit


if __name__ == "__main__":
    main()
