"""deploy/local/run starts a cluster that answers, and leaves nothing behind.

PERIGEE_BINARY names the program; it must be built with --features etcd. Needs etcd; without it, the test is not run.
"""
import os
import pathlib
import shutil
import signal
import socket
import subprocess

import pytest

from test_serving import ROOT, binary


def free_ports():
    """The first of a row of ports that nobody listens at, below those that the system hands out by itself."""
    for first in range(11_000 + os.getpid() % 100 * 150, 32_000, 150):
        try:
            for offset in (0, 1, 10, 11, 12, 13, 100, 101, 102):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def running(words):
    """Process ids whose command line has `words`."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in line and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(shutil.which("etcd") is None and "CI" not in os.environ, reason="not run: etcd is not installed")
def test_it_serves_and_ends(tmp_path):
    port = free_ports()
    program = binary()
    command = [ROOT / "deploy/local/run", "--port", str(port), "--folder", tmp_path]
    environment = {**os.environ, "PERIGEE": program}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        said = []
        try:
            for line in run.stdout:
                said.append(line)
                if line.startswith("Stop"):
                    break
            assert said and said[-1].startswith("Stop"), "".join(said)
            for router in (port + 10, port + 12):
                ask = [program, "generate", "--router", f"127.0.0.1:{router}", "--prompt", "Hello", "--max-tokens", "4"]
                answer = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False)
                assert answer.returncode == 0, answer.stderr
            assert len(running(f"etcd://127.0.0.1:{port}")) >= 8, "two routers, three replicas of two ranks"
        finally:
            run.send_signal(signal.SIGTERM)
            said.append(run.stdout.read())
        assert run.wait(timeout=60) == 0, "".join(said)
    assert running(f"127.0.0.1:{port}") == []
