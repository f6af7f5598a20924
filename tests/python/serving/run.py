"""Runs every check of checks.py against a `perigee up` that it starts: run.py --binary PATH [CHECK...].

Exit status 0 where all passed, 1 where one failed, 2 for bad usage.
"""
import argparse
import pathlib
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from checks import CHECKS, Client  # noqa: E402  (the path above comes first)
from cluster import Cluster, stubs  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--binary", required=True, help="the perigee program")
    parser.add_argument("checks", nargs="*", help="names of checks; default: all")
    arguments = parser.parse_args()
    names = {check.__name__: check for check in CHECKS}
    unknown = [name for name in arguments.checks if name not in names]
    if unknown:
        parser.error(f"unknown checks: {', '.join(unknown)}; there are {', '.join(names)}")
    wanted = [names[name] for name in arguments.checks] or CHECKS

    modules = stubs()
    failed = 0
    with Cluster(arguments.binary, "--state-slots", "16") as cluster, cluster.channel() as channel:
        client = Client(channel, modules)
        for check in wanted:
            started = time.monotonic()
            try:
                check(client, cluster)
                verdict = "ok"
            except Exception:  # noqa: BLE001  (every failure of a check is reported, and the next one runs)
                traceback.print_exc()
                failed += 1
                verdict = "FAILED"
            print(f"{verdict:6} {check.__name__} ({time.monotonic() - started:.1f} s)", flush=True)
    print(f"{len(wanted) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
