"""A served cluster on this machine, for the checks of this folder: `perigee up` as a process, its ranks by process id."""
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import threading

START_SECONDS = 120


class Client:
    """A router seen from outside; `binary` and `router` are whose."""

    def ask(self, command, *options):
        """What a client command prints as JSON; it must succeed."""
        done = self.tell(command, *options)
        assert done.returncode == 0, f"{done.args}: {done.stderr}"
        return json.loads(done.stdout)

    def tell(self, command, *options):
        """A client command as it ended."""
        line = [self.binary, command, "--router", self.router, "--json", *map(str, options)]
        return subprocess.run(line, capture_output=True, text=True, timeout=120)

    def generate(self, *options):
        """A generation as a process of its own, with piped output."""
        command = [self.binary, "generate", "--router", self.router, "--ignore-eos", *map(str, options)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Cluster(Client):
    """`perigee up` with these options, in float32 where they say nothing else, on free ports."""

    def __init__(self, binary, model, device, *options, dtype="fp32"):
        self.binary, self.log = binary, tempfile.TemporaryFile("w+")
        command = [binary, "up", "--json", "--model", model, "--device", device, "--dtype", dtype, "--port", "0",
                   "--http-port", "0", *map(str, options)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True,
                                        env=os.environ | {"PERIGEE_LOG": "info,perigee_cuda=debug"})
        guard = threading.Timer(START_SECONDS, self.process.kill)
        guard.start()
        line = self.process.stdout.readline()
        guard.cancel()
        if not line:
            raise AssertionError(f"not ready: {self.said()[-2000:]}")
        info = json.loads(line)
        self.router, self.http, self.replicas = info["grpc"], info["http"], info["replicas"]
        self.pids = [pid for replica in self.replicas for pid in replica["pids"]]

    def said(self):
        """What the processes logged so far."""
        self.log.seek(0)
        return self.log.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.pids:
            if runs(pid):
                os.kill(pid, signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            for pid in self.pids:
                if runs(pid):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError("`up` did not end in 20 s") from None


def runs(pid):
    """Whether a process is there and not only waiting to be reaped."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
