"""Two ranks that exchange by NCCL, as separate processes of one served replica: a stream is right; a rank that is killed, or
stopped, in the middle of a stream takes the replica with it within five seconds, by name, and the client hears of it.

usage: ranks.py PERIGEE CASE_DIR DEVICE   (a golden case; cuda or cuda:0,1; NCCL_MULTI_RANK_GPU_ENABLE=1 where there is one card)
"""
import json
import os
import pathlib
import signal
import sys
import threading
import time

from cluster import Cluster, runs
from safetensors.numpy import load_file

END_SECONDS, PROMPT = 5.0, 2


def replica_of_two_ranks(binary, case, device):
    return Cluster(binary, case, device, "--replicas", 1, "--tp", 2, "--state-slots", 4, "--latent-pages", 1600,
                   "--max-model-len", 100000)


def a_stream_is_right(binary, case, device):
    expected = load_file(pathlib.Path(case) / "expected.safetensors")
    prompt, greedy = expected[f"prompt_{PROMPT}"].tolist(), expected[f"greedy_{PROMPT}"].tolist()
    with replica_of_two_ranks(binary, case, device) as replica:
        client = replica.generate("--temperature", 0, "--json", "--tokens", ",".join(map(str, prompt)),
                                  "--max-tokens", len(greedy))
        out, error = client.communicate(timeout=60)
        assert client.returncode == 0, error
        tokens = json.loads(out)["choices"][0]["tokens"]
        assert tokens == greedy, f"{tokens} instead of {greedy}"
        assert "recorded a decode step" in replica.said(), "no decode step was recorded"
        assert "ranks exchange by NCCL" in replica.said(), f"the ranks do not use NCCL: {replica.said()[-2000:]}"
        pids, began = replica.pids, time.monotonic()
    while any(map(runs, pids)):
        assert time.monotonic() - began < 3 * END_SECONDS, "a rank outlives `up`"
        time.sleep(0.02)
    print(f"{len(greedy)} tokens as expected; the ranks left in {time.monotonic() - began:.1f} s")


def a_lost_rank_ends_the_replica(binary, case, device, kind):
    with replica_of_two_ranks(binary, case, device) as replica:
        client = replica.generate("--temperature", 0, "--tokens", "3,4,5", "--max-tokens", "90000", "--timeout", "60")
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
