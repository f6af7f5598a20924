"""The shape of the published model, served: times of `perigee up` on one card, as a gRPC client of its router sees them, by batch
and context, from its start to its first token, and at a million positions that are filled in. Before that the same program is
judged by golden wide in bfloat16 and by the conformance suite, and every kernel of the timed run must be among theirs.

usage: served.py PERIGEE [--cells BATCHxCONTEXT,...] [--far POSITIONS] [--model MODEL] [--conformance PROGRAM]

PERIGEE_GOLDEN names the folder with `wide`; without it, or without the suite, that part is not run.
"""
import argparse
import json
import os
import pathlib
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import launched
from cluster import Cluster

CELLS = "1x1024,8x1024,16x1024,32x1024,64x1024,128x1024,256x1024,1x8192,1x32768,1x131072,8x32768,64x8192"
FAR = 1 << 20
BUDGET, STEPS, SECONDS, START_SECONDS = 8192, 48, 500, 20


def shapes(cells):
    return [tuple(map(int, cell.split("x"))) for cell in cells.split(",")]


def sizes(cells):
    """Options of a replica for these cells: prompts are computed as fast as they can be, and beside the prompt there is room for the
    tokens that sessions generate while others' are computed."""
    batch = max(batch for batch, _ in shapes(cells))
    length = max(c + 2 * STEPS + 2 * -(-b * c // BUDGET) + b * b // BUDGET for b, c in shapes(cells))
    return ["--replicas", 1, "--tp", 1, "--state-slots", batch, "--max-batch", batch, "--token-budget", BUDGET,
            "--prompt-slowdown", 0, "--max-model-len", length, "--queue-limit", 2 * batch]


def measure(replica, cells):
    """Prints the cells."""
    line = [replica.binary, "bench", "grid", "--router", replica.router, "--json", "--cells", cells, "--steps", str(STEPS)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{done.stderr}\n{replica.said()[-2000:]}"
    for cell in json.loads(done.stdout):
        assert cell["steps"] >= STEPS, f"too few steps in which the whole batch decodes: {cell}"
        beside = cell["beside_prompts"]
        print("{batch:>4} x {context:>7}: ttft {ttft_s:.3f} s, prefill {prefill_tok_s:,.0f} tok/s, tpot {tpot_ms:.3f} ms, "
              "{decode_tok_s:,.0f} tok/s".format(**cell)
              + ("; beside prompts {p50_ms:.1f} ms (median), {p99_ms:.1f} (p99)".format(**beside) if beside else ""))


def plan_of(replica):
    plan = [line for line in replica.said().splitlines() if "state slots" in line]
    return plan[-1][-400:] if plan else "none was told"


def judged(options):
    """The kernels that golden wide and the conformance suite launched, both at once: neither is timed."""
    with ThreadPoolExecutor() as pool:
        golden = conformance = None
        if "PERIGEE_GOLDEN" in os.environ:
            golden = pool.submit(launched.of_golden, options.binary, pathlib.Path(os.environ["PERIGEE_GOLDEN"], "wide"))
        else:
            print("golden wide: not run, PERIGEE_GOLDEN is not set")
        if options.conformance:
            conformance = pool.submit(launched.of_conformance, options.conformance)
        else:
            print("conformance suite: not run")
        return [part.result() if part else set() for part in (golden, conformance)]


def main():
    options = argparse.ArgumentParser()
    options.add_argument("binary")
    options.add_argument("--cells", default=CELLS)
    options.add_argument("--far", type=int, default=FAR)
    options.add_argument("--model", default="random:48b")
    options.add_argument("--conformance")
    options = options.parse_args()
    golden, conformance = judged(options)
    began = time.monotonic()
    with Cluster(options.binary, options.model, "cuda", *sizes(options.cells), dtype="bf16") as replica:
        ready = time.monotonic() - began
        client = replica.generate("--json", "--tokens", "100,200,300", "--max-tokens", 1)
        _, error = client.communicate(timeout=60)
        first = time.monotonic() - began
        assert client.returncode == 0, error
        print(f"ready after {ready:.1f} s, first token after {first:.1f} s (limit {START_SECONDS})")
        assert first <= START_SECONDS
        measure(replica, options.cells)
        timed = launched.launched(replica.said())
        print("memory plan:", plan_of(replica))
    if options.far:
        # The last chunk of the prompt is computed over the positions that are filled in.
        cell, computed = f"1x{options.far}", min(BUDGET, options.far // 2)
        print(f"the first {options.far - computed} positions of the prompt filled in:")
        with Cluster(options.binary, options.model, "cuda", *sizes(cell), f"--fill-prompts={options.far - computed}",
                     dtype="bf16") as replica:
            measure(replica, cell)
            timed |= launched.launched(replica.said())
            print("memory plan:", plan_of(replica))
    is_accounted = launched.account(timed, golden, conformance)
    assert is_accounted or not golden or not conformance, "a kernel of the timed run was judged nowhere"


if __name__ == "__main__":
    main()
