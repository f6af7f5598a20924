"""Ranks that exchange by NCCL, as separate processes of one served replica: a stream is right; a rank that is killed, or
stopped, in the middle of a stream takes all others with it within five seconds, by name, and the client hears of it.

usage: ranks.py PERIGEE CASE_DIR DEVICE [RANKS]   (a golden case; cuda or cuda:0,1; two ranks; NCCL_MULTI_RANK_GPU_ENABLE=1 where
there is one card)
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


def replica(binary, case, device, ranks):
    return Cluster(binary, case, device, "--replicas", 1, "--tp", ranks, "--state-slots", 4, "--latent-pages", 1600,
                   "--max-model-len", 100000)


def a_stream_is_right(binary, case, device, ranks):
    expected = load_file(pathlib.Path(case) / "expected.safetensors")
    prompt, greedy = expected[f"prompt_{PROMPT}"].tolist(), expected[f"greedy_{PROMPT}"].tolist()
    with replica(binary, case, device, ranks) as cluster:
        client = cluster.generate("--temperature", 0, "--json", "--tokens", ",".join(map(str, prompt)),
                                  "--max-tokens", len(greedy))
        out, error = client.communicate(timeout=60)
        assert client.returncode == 0, error
        tokens = json.loads(out)["choices"][0]["tokens"]
        assert tokens == greedy, f"{tokens} instead of {greedy}"
        assert "recorded a decode step" in cluster.said(), "no decode step was recorded"
        assert "ranks exchange by NCCL" in cluster.said(), f"the ranks do not use NCCL: {cluster.said()[-2000:]}"
        pids, began = cluster.pids, time.monotonic()
    while any(map(runs, pids)):
        assert time.monotonic() - began < 3 * END_SECONDS, "a rank outlives `up`"
        time.sleep(0.02)
    print(f"{ranks} ranks: {len(greedy)} tokens as expected; the ranks left in {time.monotonic() - began:.1f} s")


def a_lost_rank_ends_the_replica(binary, case, device, ranks, kind):
    with replica(binary, case, device, ranks) as cluster:
        client = cluster.generate("--temperature", 0, "--tokens", "3,4,5", "--max-tokens", "90000", "--timeout", "60")
        # Token ids as they come, three characters or so each.
        assert len(client.stdout.read(50)) == 50, f"the stream ended: {client.stderr.read()}"
        victim = cluster.pids[1]
        others = [pid for pid in cluster.pids if pid != victim]
        os.kill(victim, kind)
        began = time.monotonic()
        # What is left of the stream must not fill the pipe.
        threading.Thread(target=client.stdout.read, daemon=True).start()
        while any(map(runs, others)) and time.monotonic() - began < 3 * END_SECONDS:
            time.sleep(0.02)
        took = time.monotonic() - began
        if kind == signal.SIGSTOP:
            os.kill(victim, signal.SIGKILL)
        assert took < END_SECONDS, f"the others ended after {took:.1f} s: {cluster.said()[-2000:]}"
        client.wait(timeout=20)
        error = client.stderr.read()
        assert client.returncode == 1 and error, f"exit status {client.returncode}, {error!r}"
        assert "rank 1" in cluster.said(), f"nobody names rank 1: {cluster.said()[-2000:]}"
        print(f"{kind.name}: the others ended after {took:.1f} s; client: {error.strip().splitlines()[-1][:160]}")


def main():
    binary, case, device, *more = sys.argv[1:]
    ranks = int(more[0]) if more else 2
    a_stream_is_right(binary, case, device, ranks)
    a_lost_rank_ends_the_replica(binary, case, device, ranks, signal.SIGKILL)
    a_lost_rank_ends_the_replica(binary, case, device, ranks, signal.SIGSTOP)


if __name__ == "__main__":
    main()
