"""Starts `perigee up` and talks to it: stubs generated from the protos, plain HTTP, and the client commands."""
import contextlib
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import grpc
from grpc_tools import protoc

PROTOS = pathlib.Path(__file__).resolve().parents[3] / "proto"
START_SECONDS = 60


def stubs():
    """Modules that grpcio-tools generates, as a client's build would."""
    folder = tempfile.mkdtemp(prefix="perigee-stubs-")
    files = ["perigee/v1/inference.proto", "perigee/v1/cluster.proto"]
    status = protoc.main(["protoc", f"-I{PROTOS}", f"--python_out={folder}", f"--grpc_python_out={folder}", *files])
    assert status == 0, f"protoc: exit status {status}"
    sys.path.insert(0, folder)
    names = ["inference_pb2", "inference_pb2_grpc", "cluster_pb2", "cluster_pb2_grpc"]
    return [importlib.import_module(f"perigee.v1.{name}") for name in names]


class Cluster:
    """A running `perigee up`; `info` is the line that it printed when it was ready."""

    def __init__(self, binary, *options, stderr=None):
        self.binary = binary
        model = [] if "--model" in options else ["--model", "random:tiny"]
        command = [binary, "up", "--json", "--port", "0", "--http-port", "0", "--end-with-input", *model, *options]
        # Its input stays open while this process lives, and ends with it however that ends.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
        guard = threading.Timer(START_SECONDS, self.process.kill)
        guard.start()
        line = self.process.stdout.readline()
        guard.cancel()
        if not line:
            raise RuntimeError(f"`up` ended with status {self.process.wait()} before it was ready")
        self.info = json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @contextlib.contextmanager
    def channel(self, address=None):
        with grpc.insecure_channel(address or self.info["grpc"]) as channel:
            yield channel

    def command(self, *arguments):
        """A client command: exit status, standard output, standard error."""
        command = [self.binary, *arguments, "--router", self.info["grpc"]]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return result.returncode, result.stdout, result.stderr


def get(address, path):
    """Status and text of a page on an HTTP port."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until(condition, what, seconds=20):
    """Waits for something that happens by itself."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what}")
