"""Which kernels a program launched, and where each of them was checked: every choice of a kernel that a timed run made is held
against those of runs whose results were judged. Kernels of cuBLAS are chosen by cuBLAS and have no names here."""
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOG = "info,perigee_cuda=debug"
FIRST_LAUNCH = re.compile(r'first launch.*kernel="?(\w+)')
# Chunks of a prompt: the choices depend on the tokens of a step.
CHUNKS = [None, 64, 7, 1]


def launched(log):
    """The kernels whose first launch a log tells."""
    return set(FIRST_LAUNCH.findall(re.sub(r"\x1b\[[0-9;]*m", "", log)))


def of_golden(binary, case):
    """Judges a golden case in bfloat16 in several chunkings at once, and gives the kernels that they launched."""
    with ThreadPoolExecutor() as pool:
        return set().union(*pool.map(lambda chunk: of_chunks(binary, case, chunk), CHUNKS))


def of_chunks(binary, case, chunk):
    expected = case / "expected.safetensors"
    greedy = len(load_file(expected)["greedy_0"])
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "out.safetensors")
        line = [binary, "score", "--model", case, "--tokens", expected, "--feed", expected, "--experts", expected, "--out", out,
                "--greedy", greedy, "--device", "cuda", "--dtype", "bf16", *([] if chunk is None else ["--chunk", chunk])]
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=120,
                              env=os.environ | {"PERIGEE_LOG": LOG})
        assert done.returncode == 0, done.stderr[-2000:]
        judge = [sys.executable, ROOT / "tests/cases/compare.py", case, out, "--dtype", "bf16"]
        judged = subprocess.run(list(map(str, judge)), capture_output=True, text=True)
        assert judged.returncode == 0, f"chunks of {chunk}: {judged.stdout[-2000:]}"
        found, right = load_file(out), load_file(expected)
    off = max(float(np.linalg.norm(found[name] - right[name]) / np.linalg.norm(right[name])) for name in found if "logits" in name)
    print(f"{case.name} in bf16, chunks of {chunk or 'all'}: within the limits, logits off by {off:.2e}")
    return launched(done.stderr)


def of_conformance(program):
    """Runs the conformance suite in bfloat16, and gives the kernels that it launched."""
    with tempfile.TemporaryDirectory() as folder:
        names = pathlib.Path(folder, "kernels")
        done = subprocess.run([program, "bf16", "--launched", names], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        print(next(line for line in done.stdout.splitlines() if line.startswith("conformance of")))
        return set(names.read_text().split())


def account(timed, golden, conformance):
    """Prints where each kernel of the timed run was judged; true where each was, as far as there was a judge."""
    print(f"{len(timed)} kernels were launched in the timed run; {len(timed & golden)} of them by golden wide too: "
          f"{' '.join(sorted(timed & golden)) or 'none'}")
    print(f"by the conformance suite and not by golden wide: {' '.join(sorted(timed & conformance - golden)) or 'none'}")
    left = timed - golden - conformance
    print(f"by neither: {' '.join(sorted(left)) or 'none'}")
    return bool(timed) and not left
