"""Single workers that differ in device or type, beside one router, as processes started by hand; `up`'s replicas are equal."""
import json
import os
import pathlib
import re
import socket
import subprocess
import tempfile
import threading
import time

from cluster import START_SECONDS, Client


def free_address():
    """An address that nobody listens at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


class Fleet(Client):
    """Replicas of one rank each, by name: (device, dtype, further options)."""

    def __init__(self, binary, model, replicas, *options):
        self.binary, self.folder, self.processes = binary, tempfile.TemporaryDirectory(), []
        internal = {name: free_address() for name in replicas}
        registry = pathlib.Path(self.folder.name, "registry.json")
        registry.write_text(json.dumps({"replicas": [{"replica": name, "internal": at} for name, at in internal.items()]}))
        common = ["--model", model, f"--registry=file:{registry}"]
        for name, (device, dtype, more) in replicas.items():
            self.start(name, "worker", "--replica", name, "--rank=0", "--tp=1", "--leader", free_address(), "--internal",
                       internal[name], "--http", free_address(), "--device", device, "--dtype", dtype, *common, *options, *more)
        router = self.start("router", "router", "--listen=127.0.0.1:0", "--http=127.0.0.1:0", *common)
        guard = threading.Timer(START_SECONDS, router.kill)
        guard.start()
        self.router = re.search(r"[\d.]+:\d+", router.stdout.readline()).group()
        end = time.monotonic() + START_SECONDS
        while sum(replica["status"] == "ready" for replica in self.ask("replicas")) < len(replicas):
            assert time.monotonic() < end, f"not ready: {self.said()[-3000:]}"
        guard.cancel()

    def start(self, name, *command):
        log = open(pathlib.Path(self.folder.name, f"{name}.log"), "w")
        process = subprocess.Popen([self.binary, *map(str, command)], stdout=subprocess.PIPE, stderr=log, text=True,
                                   env=os.environ | {"PERIGEE_LOG": "info"})
        self.processes.append(process)
        return process

    def said(self):
        """What the processes logged so far."""
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(pathlib.Path(self.folder.name).glob("*.log")))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        self.folder.cleanup()
