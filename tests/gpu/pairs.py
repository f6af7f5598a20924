"""Sessions whose states go by pairs of ranks (`--handoff pair`: NCCL between GPUs, loopback between CPUs), in float32: there and back, each
stream held against the same request undisturbed, with bytes by the way that they took; and targets that are killed at different moments
of a handoff, after which the session goes on where it was and the pairs of others are whole.

usage: pairs.py PERIGEE MODEL DEVICE [RANKS]   (NCCL_MULTI_RANK_GPU_ENABLE=1 where replicas share a card)
"""
import itertools
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

# A replica has eight pairs at most, two with each of the others.
MOVES, KILLS_MS, MEETING_SECONDS = 10, [5, 10, 20], 60
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


def meet(cluster, board):
    """Has short sessions go from one replica to every other and back, until all moves of a round go by pairs, which are met in the background;
    that replica, and the bytes of a state."""
    home, end = None, time.monotonic() + MEETING_SECONDS
    for number in itertools.count():
        client = cluster.generate("--json", "--request-id", f"meets-{number}", *REQUEST, "--max-tokens", 6000)
        session = owned(board, f"meets-{number}", client, 20)
        home = home or session["owner"]
        if session["owner"] != home:
            cluster.ask("migrate", session["session"], "--to", home, "--mode", "split")
        before = bytes_by_way(cluster.replicas)
        others = [replica["replica"] for replica in cluster.replicas if replica["replica"] != home]
        for target in others:
            for to in [target, home]:
                cluster.ask("migrate", session["session"], "--to", to, "--mode", "split")
        client.kill()
        client.communicate()
        gained = {way: bytes - before[way] for way, bytes in bytes_by_way(cluster.replicas).items()}
        if gained["grpc"] == 0:
            return home, gained["pair"] // (2 * len(others))
        assert time.monotonic() < end, f"no round of moves by pairs within {MEETING_SECONDS} s: {gained} in the last one"


def there_and_back(binary, model, device, ranks):
    options = ["--replicas", 2, "--tp", ranks, "--state-slots", 8, "--latent-pages", 256, "--max-model-len", 8192, "--handoff", "pair"]
    with Cluster(binary, model, device, *options) as cluster, Board(cluster) as board:
        names = [replica["replica"] for replica in cluster.replicas]
        request = [*REQUEST, "--max-tokens", 4000]
        expected = choices_of(cluster.generate("--json", *request))
        _, state = meet(cluster, board)
        first = bytes_by_way(cluster.replicas)
        client = cluster.generate("--json", "--request-id", "walks", *request)
        session, frozen = owned(board, "walks", client, 20), []
        for _ in range(MOVES):
            target = names[(names.index(session["owner"]) + 1) % 2]
            answer = cluster.ask("migrate", session["session"], "--to", target, "--mode", "split")
            frozen.append(answer["phases"]["frozen_ms"])
            session["owner"] = target
        found = choices_of(client)
        assert found == expected, "another stream after its moves"
        ways = bytes_by_way(cluster.replicas)
        all_free(cluster)
        said = [line for line in cluster.said().splitlines() if "pair" in line and "session moved" not in line]
    print(f"between replicas of {ranks} ranks: bytes {first} while pairs were met, {ways} after {MOVES} more moves; stood still "
          f"{statistics.median(frozen):.1f} ms, {max(frozen):.1f} at most", flush=True)
    print("\n".join(line[-300:] for line in said[:20]), flush=True)
    assert ways == first | {"pair": first["pair"] + MOVES * state}, f"all {MOVES} states, of {state} bytes, should go by pairs"


def killed_targets(binary, model, device):
    """One session that stays at its replica, because every target dies on it, and goes by a pair to the last one."""
    options = ["--replicas", len(KILLS_MS) + 2, "--tp", 1, "--state-slots", 4, "--latent-pages", 256, "--max-model-len", 16384,
               "--handoff", "pair", "--move-grace", 2]
    with Cluster(binary, model, device, *options) as cluster, Board(cluster) as board:
        request = [*REQUEST, "--max-tokens", 12000]
        expected = choices_of(cluster.generate("--json", *request))
        home, _ = meet(cluster, board)
        client = cluster.generate("--json", "--request-id", "stays", *request)
        session = owned(board, "stays", client, 20)
        if session["owner"] != home:
            cluster.ask("migrate", session["session"], "--to", home, "--mode", "split")
        at_home = [replica for replica in cluster.replicas if replica["replica"] == home]
        *victims, last = [replica for replica in cluster.replicas if replica["replica"] != home]
        before, broken = bytes_by_way(at_home), 0
        for after_ms, target in zip(KILLS_MS, victims, strict=True):
            line = [binary, "migrate", "--router", cluster.router, session["session"], "--to", target["replica"]]
            move = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            time.sleep(after_ms / 1e3)
            for pid in target["pids"]:
                os.kill(pid, signal.SIGKILL)
            said = move.communicate(timeout=60)[0].strip().splitlines()
            broken += any("stays where it was" in line for line in said)
            print(f"{target['replica']} killed {after_ms} ms after the order: {said[-1][:160] if said else 'silent'}", flush=True)
        assert broken, "every handoff was done before its target was killed"
        # Where a target had it already, another replica goes on with it.
        owner = owned(board, "stays", client, 20)["owner"]
        if owner == home:
            cluster.ask("migrate", session["session"], "--to", last["replica"], "--mode", "split")
            after = bytes_by_way(at_home)
            assert after["pair"] > before["pair"], f"the pair with the last replica is not whole: {before}, then {after}"
        print(f"it was at {owner}, its home is {home}", flush=True)
        found = choices_of(client)
        assert found == expected, "another stream after the kills"
    print(f"{len(found[0])} tokens as undisturbed", flush=True)


def main():
    binary, model, device, *more = sys.argv[1:]
    there_and_back(binary, model, device, int(more[0]) if more else 1)
    killed_targets(binary, model, device)


if __name__ == "__main__":
    main()
