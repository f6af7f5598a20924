"""The shape of the published model, served: times of `perigee up` on one card, as a gRPC client of its router sees them, by batch
and context.

usage: served.py PERIGEE [CELLS [MODEL]]   (BATCHxCONTEXT,...; default: a short grid of random:48b)
"""
import json
import subprocess
import sys
import time

from cluster import Cluster

CELLS = "1x1024,8x1024,32x1024,64x1024,256x1024,1x8192,64x8192"
BUDGET, STEPS, SECONDS = 8192, 48, 500


def main():
    binary = sys.argv[1]
    cells = sys.argv[2] if len(sys.argv) > 2 else CELLS
    model = sys.argv[3] if len(sys.argv) > 3 else "random:48b"
    shapes = [tuple(map(int, cell.split("x"))) for cell in cells.split(",")]
    batch, context = max(batch for batch, _ in shapes), max(context for _, context in shapes)
    # Beside the prompt, the tokens that sessions generate while others are computed.
    length = context + 1 + STEPS + max(2 * -(-b * c // BUDGET) + b * b // BUDGET for b, c in shapes)
    began = time.monotonic()
    with Cluster(binary, model, "cuda", "--replicas", 1, "--tp", 1, "--state-slots", batch, "--max-batch", batch,
                 "--token-budget", BUDGET, "--max-model-len", length, "--queue-limit", 2 * batch, dtype="bf16") as replica:
        print(f"ready after {time.monotonic() - began:.1f} s")
        line = [binary, "bench", "grid", "--router", replica.router, "--json", "--cells", cells, "--steps", str(STEPS),
                "--token-budget", str(BUDGET)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, f"{done.stderr}\n{replica.said()[-2000:]}"
        for cell in json.loads(done.stdout):
            assert cell["steps"] >= STEPS, f"too few steps in which the whole batch decodes: {cell}"
            print("{batch:>4} x {context:>7}: ttft {ttft_s:.3f} s, prefill {prefill_tok_s:,.0f} tok/s, tpot {tpot_ms:.3f} ms, "
                  "{decode_tok_s:,.0f} tok/s".format(**cell))
        plan = [line for line in replica.said().splitlines() if "state slots" in line]
        print("memory plan:", plan[-1][-400:] if plan else "none was told")


if __name__ == "__main__":
    main()
