"""deploy/ does what it says: the ranks of a container start, drain and end together, and the runbook's table is computed."""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helm"))

import capacity  # noqa: E402  (the paths above come first)
import render  # noqa: E402
from test_local_cluster import free_ports  # noqa: E402
from test_serving import ROOT, binary  # noqa: E402

RANKS = ROOT / "deploy" / "images" / "perigee-ranks"


@pytest.fixture
def replica(tmp_path):
    """Two ranks as the chart starts them, ready; with their HTTP port."""
    first = free_ports()
    ports = [first, first + 1]
    command = [RANKS, "2", "0", "--replica=one", "--tp=2", f"--leader=127.0.0.1:{ports[0]}", "--threads=1", "--grace=60",
               "--", "--internal=127.0.0.1:0", "--listen=127.0.0.1:0", f"--http=127.0.0.1:{ports[1]}"]
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env={**os.environ, "PERIGEE": binary()}, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not is_healthy(ports[1]):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def is_healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def probes():
    """Paths that the chart has Kubernetes ask for, by the kind of probe."""
    for document in render.documents(render.render({})):
        if document["kind"] in ("Deployment", "StatefulSet"):
            container = document["spec"]["template"]["spec"]["containers"][0]
            yield {kind: container[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}


def test_ready_processes_answer_every_probe_of_the_chart():
    command = [binary(), "up", "--json", "--replicas=1", "--tp=1", "--threads=1", "--port=0", "--http-port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        places = json.loads(process.stdout.readline())
        found = list(probes())
        assert len(found) == 2 and found[0] == found[1]
        for place in (places["http"], places["replicas"][0]["http"]):
            for path in found[0].values():
                with urllib.request.urlopen(f"http://{place}{path}", timeout=10) as answer:
                    assert answer.status == 200, (place, path)
    finally:
        process.terminate()
        process.wait(60)


def ranks(process):
    """Process ids of the ranks, in their order."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    lines = {int(child): pathlib.Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0") for child in children}
    return sorted(lines, key=lambda child: int(lines[child][lines[child].index(b"--rank") + 1]))


def test_sigterm_drains_and_is_a_success(replica):
    pids = ranks(replica)
    assert len(pids) == 2
    replica.send_signal(signal.SIGTERM)
    assert replica.wait(30) == 0
    assert not [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_container(replica, rank):
    pids = ranks(replica)
    os.kill(pids[rank], signal.SIGKILL)
    assert replica.wait(30) == 128 + signal.SIGKILL
    assert not [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]


def test_drained_it_waits_for_the_signal_that_follows_the_hook(replica):
    pids = ranks(replica)
    subprocess.run([RANKS, "drain"], env={**os.environ, "PERIGEE_RANKS_PID": str(replica.pid)}, timeout=60, check=True)
    assert not [pid for pid in pids if pathlib.Path(f"/proc/{pid}").exists()]
    assert replica.poll() is None
    replica.send_signal(signal.SIGTERM)
    assert replica.wait(30) == 0


def test_options_that_the_program_refuses_end_it(tmp_path):
    command = [RANKS, "2", "0", "--tensor-parallel=2"]
    result = subprocess.run(command, env={**os.environ, "PERIGEE": binary()}, capture_output=True, text=True, timeout=30,
                            check=False)
    assert result.returncode == 2 and "--tensor-parallel" in result.stderr


@pytest.mark.parametrize("words", [[], ["2"], ["two", "0"], ["0", "0"]])
def test_wrong_usage_is_told(words):
    result = subprocess.run([RANKS, *words], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2 and "perigee-ranks COUNT MACHINE" in result.stderr


def test_the_runbook_has_the_computed_table():
    text = (ROOT / "deploy" / "runbook.md").read_text()
    assert "\n".join(capacity.table()) in text


def test_capacity_follows_from_the_sizes_of_the_model():
    assert capacity.STATE_BYTES == 41_943_040
    assert capacity.TAIL_BYTES == 1_474_560
    assert capacity.TOKEN_BYTES == 8064


@pytest.mark.parametrize("file", sorted((ROOT / "deploy" / "images").glob("*.Dockerfile")), ids=lambda file: file.stem)
def test_images_are_pinned_unprivileged_and_copy_what_is_there(file):
    text = file.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2 and all(re.search(r":\d+\.\d+", base) for base in bases)
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["65532:65532"]
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE):
        assert (ROOT / source).exists(), source
    for package in re.findall(r"nvidia-\S+", text):
        assert "==" in package, package


def test_there_is_an_image_for_each_that_the_chart_names():
    named = {container["image"].rsplit("/", 1)[1].partition(":")[0]
             for values in render.matrix().values()
             for document in render.documents(render.render(values))
             for spec in [document.get("spec", {})]
             for template in [spec.get("template") or spec.get("leaderWorkerTemplate", {}).get("workerTemplate") or {}]
             for container in template.get("spec", {}).get("containers", []) if container["name"] in ("router", "worker")}
    assert named == {file.stem for file in (ROOT / "deploy" / "images").glob("*.Dockerfile")}
