"""Two ranks that exchange by NCCL, as separate processes of one served replica: a stream is right; a rank that is killed, or
stopped, in the middle of a stream takes the replica with it within five seconds, by name, and the client hears of it.

usage: ranks.py PERIGEE CASE_DIR DEVICE   (a golden case; cuda or cuda:0,1; NCCL_MULTI_RANK_GPU_ENABLE=1 where there is one card)
"""
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

from safetensors.numpy import load_file

START_SECONDS, END_SECONDS, PROMPT = 120, 5.0, 2


class Replica:
    """`perigee up` with one replica of two ranks."""

    def __init__(self, binary, case, device):
        self.binary, self.log = binary, tempfile.TemporaryFile("w+")
        options = ["--replicas", "1", "--tp", "2", "--device", device, "--dtype", "fp32", "--state-slots", "4",
                   "--latent-pages", "1600", "--max-model-len", "100000", "--port", "0", "--http-port", "0"]
        self.process = subprocess.Popen([binary, "up", "--json", "--model", case, *options], stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, env=os.environ | {"PERIGEE_LOG": "info"})
        guard = threading.Timer(START_SECONDS, self.process.kill)
        guard.start()
        line = self.process.stdout.readline()
        guard.cancel()
        if not line:
            raise AssertionError(f"not ready: {self.said()[-2000:]}")
        info = json.loads(line)
        self.router, self.pids = info["grpc"], info["replicas"][0]["pids"]

    def said(self):
        self.log.seek(0)
        return self.log.read()

    def generate(self, *options):
        command = [self.binary, "generate", "--router", self.router, "--temperature", "0", "--ignore-eos", *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

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
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def a_stream_is_right(binary, case, device):
    expected = load_file(pathlib.Path(case) / "expected.safetensors")
    prompt, greedy = expected[f"prompt_{PROMPT}"].tolist(), expected[f"greedy_{PROMPT}"].tolist()
    with Replica(binary, case, device) as replica:
        client = replica.generate("--json", "--tokens", ",".join(map(str, prompt)), "--max-tokens", str(len(greedy)))
        out, error = client.communicate(timeout=60)
        assert client.returncode == 0, error
        tokens = json.loads(out)["choices"][0]["tokens"]
        assert tokens == greedy, f"{tokens} instead of {greedy}"
        assert "ranks exchange by NCCL" in replica.said(), f"the ranks do not use NCCL: {replica.said()[-2000:]}"
        pids, began = replica.pids, time.monotonic()
    while any(map(runs, pids)):
        assert time.monotonic() - began < 3 * END_SECONDS, "a rank outlives `up`"
        time.sleep(0.02)
    print(f"{len(greedy)} tokens as expected; the ranks left in {time.monotonic() - began:.1f} s")


def a_lost_rank_ends_the_replica(binary, case, device, kind):
    with Replica(binary, case, device) as replica:
        client = replica.generate("--tokens", "3,4,5", "--max-tokens", "90000", "--timeout", "60")
        # Token ids as they come, three characters or so each.
        assert len(client.stdout.read(50)) == 50, f"the stream ended: {client.stderr.read()}"
        leader, victim = replica.pids
        os.kill(victim, kind)
        began = time.monotonic()
        # What is left of the stream must not fill the pipe.
        threading.Thread(target=client.stdout.read, daemon=True).start()
        while runs(leader) and time.monotonic() - began < 3 * END_SECONDS:
            time.sleep(0.02)
        took = time.monotonic() - began
        if kind == signal.SIGSTOP:
            os.kill(victim, signal.SIGKILL)
        assert took < END_SECONDS, f"the leader ended after {took:.1f} s: {replica.said()[-2000:]}"
        client.wait(timeout=20)
        error = client.stderr.read()
        assert client.returncode == 1 and error, f"exit status {client.returncode}, {error!r}"
        assert "rank 1" in replica.said(), f"nobody names rank 1: {replica.said()[-2000:]}"
        print(f"{kind.name}: the leader ended after {took:.1f} s; client: {error.strip().splitlines()[-1][:160]}")


def main():
    binary, case, device = sys.argv[1:]
    a_stream_is_right(binary, case, device)
    a_lost_rank_ends_the_replica(binary, case, device, signal.SIGKILL)
    a_lost_rank_ends_the_replica(binary, case, device, signal.SIGSTOP)


if __name__ == "__main__":
    main()
