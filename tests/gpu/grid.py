"""`bench grid` on one served replica of a number of ranks, which runs the largest batch as a whole where no option says otherwise.

usage: grid.py PERIGEE MODEL DEVICE RANKS CELLS [OPTION of `up`]...
"""
import subprocess
import sys

from cluster import Cluster


def main():
    binary, model, device, ranks, cells, *options = sys.argv[1:]
    dtype = "fp32" if device == "cpu" else "bf16"
    batch = max(int(cell.split("x")[0]) for cell in cells.split(","))
    for option in "--max-batch", "--state-slots":
        if not any(given.split("=")[0] == option for given in options):
            options += [option, str(batch)]
    with Cluster(binary, model, device, "--replicas", 1, "--tp", ranks, *options, dtype=dtype) as cluster:
        line = [binary, "bench", "grid", "--router", cluster.router, "--cells", cells, "--steps", "16"]
        subprocess.run(line, check=True)


if __name__ == "__main__":
    main()
