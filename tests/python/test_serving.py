"""The checks of serving/ pass against the built program.

PERIGEE_BINARY names it; default: the newer of target/debug/perigee and target/release/perigee.
"""
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def binary():
    if named := os.environ.get("PERIGEE_BINARY"):
        return named
    built = [path for path in (ROOT / "target").glob("*/perigee") if path.parent.name in ("debug", "release")]
    assert built, "no target/*/perigee: build it with cargo build, or name one in PERIGEE_BINARY"
    return str(max(built, key=lambda path: path.stat().st_mtime))


def test_clients_in_python():
    command = [sys.executable, ROOT / "tests/python/serving/run.py", "--binary", binary()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith("16 passed, 0 failed"), result.stdout
