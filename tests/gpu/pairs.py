"""Sessions whose states go by pairs of ranks (`--handoff pair`: NCCL between GPUs, loopback between CPUs), in float32: there and back, each
stream held against the same request undisturbed, with bytes by the way that they took; and targets that are killed at different moments
of a handoff, after which the session goes on where it was and the pairs of others are whole.

usage: pairs.py PERIGEE MODEL DEVICE [RANKS]   (NCCL_MULTI_RANK_GPU_ENABLE=1 where replicas share a card)
"""
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request

from cluster import Cluster
from moves import Board, all_free, choices_of

MOVES, KILLS_MS = 12, [4, 8, 14, 22]
REQUEST = ["--tokens", ",".join(str(3 + 5 * at % 200) for at in range(300)), "--temperature", 0]


def bytes_by_way(replicas):
    """Bytes of states that left these replicas, by way."""
    found = {}
    for replica in replicas:
        with urllib.request.urlopen(f"http://{replica['http']}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        for way, value in re.findall(r'^perigee_migration_state_bytes_total\{way="(\w+)"\} (\S+)$', text, re.MULTILINE):
            found[way] = found.get(way, 0) + int(float(value))
    return found


def owned(board, name, client, tokens):
    """The session of a request once it has so many tokens."""
    mine = lambda sessions: next((one for one in sessions if one["request_id"] == name and one["context"] > 300 + tokens), None)
    return board.wait_for(f"session {name}", mine, client)


def there_and_back(binary, model, device, ranks):
    options = ["--replicas", 2, "--tp", ranks, "--state-slots", 8, "--latent-pages", 256, "--max-model-len", 8192, "--handoff", "pair"]
    with Cluster(binary, model, device, *options) as cluster, Board(cluster) as board:
        names = [replica["replica"] for replica in cluster.replicas]
        request = [*REQUEST, "--max-tokens", 4000]
        expected = choices_of(cluster.generate("--json", *request))
        client = cluster.generate("--json", "--request-id", "walks", *request)
        session, frozen = owned(board, "walks", client, 20), []
        for number in range(MOVES):
            target = names[(names.index(session["owner"]) + 1) % 2]
            answer = cluster.ask("migrate", session["session"], "--to", target, "--mode", "split")
            frozen.append(answer["phases"]["frozen_ms"])
            session["owner"] = target
            # Both directions are met beside the first two moves.
            time.sleep(3 if number < 2 else 0.2)
        found = choices_of(client)
        assert found == expected, "another stream after its moves"
        ways = bytes_by_way(cluster.replicas)
        all_free(cluster)
        said = [line for line in cluster.said().splitlines() if "pair" in line]
    print(f"{MOVES} moves between replicas of {ranks} ranks: bytes {ways}; stood still {frozen[0]:.1f} ms by the stream, "
          f"{statistics.median(frozen[2:]):.1f} ms by pairs, the most {max(frozen[2:]):.1f}", flush=True)
    print("\n".join(line[-300:] for line in said[:20] if "session moved" not in line), flush=True)
    assert ways["pair"] == 5 * ways["grpc"], f"{MOVES - 2} of {MOVES} states should go by pairs: {ways}"


def killed_targets(binary, model, device):
    """One session that stays at its replica, because every target dies on it, and goes by a pair to the last one."""
    options = ["--replicas", len(KILLS_MS) + 2, "--tp", 1, "--state-slots", 4, "--latent-pages", 128, "--max-model-len", 8192,
               "--handoff", "pair", "--move-grace", 2]
    with Cluster(binary, model, device, *options) as cluster, Board(cluster) as board:
        request = [*REQUEST, "--max-tokens", 6000]
        expected = choices_of(cluster.generate("--json", *request))
        client = cluster.generate("--json", "--request-id", "stays", *request)
        session = owned(board, "stays", client, 20)
        home = session["owner"]
        others = [replica for replica in cluster.replicas if replica["replica"] != home]
        for replica in others:
            # There and back: pairs with all of them.
            cluster.ask("migrate", session["session"], "--to", replica["replica"], "--mode", "split")
            cluster.ask("migrate", session["session"], "--to", home, "--mode", "split")
        time.sleep(3)
        cluster_of_home = [replica for replica in cluster.replicas if replica["replica"] == home]
        before = bytes_by_way(cluster_of_home)
        for after_ms, target in zip(KILLS_MS, others):
            line = [binary, "migrate", "--router", cluster.router, session["session"], "--to", target["replica"]]
            move = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            time.sleep(after_ms / 1e3)
            for pid in target["pids"]:
                os.kill(pid, signal.SIGKILL)
            said = move.communicate(timeout=60)[0].strip().splitlines()
            print(f"{target['replica']} killed {after_ms} ms after the order: {said[-1][:160] if said else 'silent'}", flush=True)
            # Where it had the session already, another one goes on with it.
            session = owned(board, "stays", client, 20)
            if session["owner"] not in (home, others[-1]["replica"]):
                print(f"it is at {session['owner']} now", flush=True)
        last = others[-1]["replica"]
        if session["owner"] == home:
            cluster.ask("migrate", session["session"], "--to", last, "--mode", "split")
            after = bytes_by_way(cluster_of_home)
            print(f"bytes that left {home} after the kills: {after['pair'] - before['pair']} by pairs, "
                  f"{after['grpc'] - before['grpc']} by the stream", flush=True)
            assert after["pair"] > before["pair"], "the pair with the last replica is not whole"
        found = choices_of(client)
        assert found == expected, "another stream after the kills"
    print(f"{len(found[0])} tokens as undisturbed", flush=True)


def main():
    binary, model, device, *more = sys.argv[1:]
    there_and_back(binary, model, device, int(more[0]) if more else 1)
    killed_targets(binary, model, device)


if __name__ == "__main__":
    main()
