"""Sessions that change replicas on a device, in float32: random schedules over three replicas (split and whole moves, before the
first token and after, there and back, several choices of one request, latents at several homes), each stream held against the
same request undisturbed; latents that follow; sources that are killed while they hand a session over; and a CPU's sessions on a
device and back. Every schedule follows from its seed.

usage: moves.py PERIGEE MODEL DEVICE [SCHEDULES [SEED]]
"""
import collections
import concurrent.futures
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request

from cluster import Cluster
from fleet import Fleet

AT_ONCE, WAIT_SECONDS, MOST_MOVES = 8, 60, 5
# Where the undisturbed run's own two best logits are nearer than that, rounding may choose; one run of a hundred may need it.
MARGIN, EXCUSED = 1e-4, 0.01
# What an operator's move may end with where the session had ended or was on its way already.
NOT_MOVED = ("notfound", "aborted", "failedprecondition")


class Board:
    """The sessions of a cluster, asked for again and again."""

    def __init__(self, cluster):
        self.cluster, self.sessions, self.looks, self.changed = cluster, [], 0, threading.Condition()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def look(self):
        while not self.ended.is_set():
            found = self.cluster.tell("sessions")
            if found.returncode == 0:
                with self.changed:
                    self.sessions, self.looks = json.loads(found.stdout), self.looks + 1
                    self.changed.notify_all()

    def wait_for(self, what, ready, client):
        """What `ready` makes of the sessions, once it is something; None where the client has ended."""
        end = time.monotonic() + WAIT_SECONDS
        with self.changed:
            while time.monotonic() < end:
                if (found := ready(self.sessions)) is not None:
                    return found
                if client.poll() is not None:
                    return None
                self.changed.wait(1)
        raise AssertionError(f"no {what} within {WAIT_SECONDS} s")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()


def schedule(seed, replicas):
    """A request, and when its sessions move where."""
    draw = random.Random(seed)
    # Every third moves as soon as it is known, which is in its prompt if that is long.
    early = seed % 3 == 0
    least = 800 if early else 16
    prompt = [draw.randrange(3, 250) for _ in range(round(math.exp(draw.uniform(math.log(least), math.log(1500)))))]
    tokens, choices = draw.randrange(150, 400), draw.choice([1, 1, 1, 2, 3])
    options = ["--tokens", ",".join(map(str, prompt)), "--max-tokens", tokens, "--n", choices]
    greedy = draw.random() < 0.5
    options += ["--temperature", 0] if greedy else ["--temperature", 0.9, "--seed", draw.randrange(1 << 32)]
    if not greedy:
        options += draw.choice([[], ["--top-p", 0.95], ["--top-k", 40], ["--min-p", 0.02]])
    moves = [(draw.randrange(choices), draw.randrange(tokens * 3 // 4), draw.randrange(1, replicas),
              draw.choice(["split", "split", "whole"])) for _ in range(draw.randrange(1, MOST_MOVES + 1))]
    moves = sorted(((choice, -len(prompt) if at == 0 and early else after, *more)
                    for at, (choice, after, *more) in enumerate(moves)), key=lambda move: move[1])
    return prompt, options, greedy, moves


def choices_of(client):
    out, error = client.communicate(timeout=300)
    assert client.returncode == 0, error
    return [choice["tokens"] for choice in json.loads(out)["choices"]]


def moved(cluster, board, name, names, prompt, options, moves):
    """Choices of a request whose sessions move, and what became of the moves."""
    client, done = cluster.generate("--json", "--request-id", name, *options), []
    for choice, after, further, mode in moves:
        def due(sessions):
            mine = sorted((one for one in sessions if one["request_id"] == name), key=lambda one: one["session"])
            one = mine[choice % len(mine)] if mine else None
            return one if one and one["context"] >= len(prompt) + after else None
        session = board.wait_for(f"session of {name} with {after} tokens", due, client)
        if session is None:
            break
        target = names[(names.index(session["owner"]) + further) % len(names)]
        answer = cluster.tell("migrate", session["session"], "--to", target, "--mode", mode)
        what = json.loads(answer.stdout) if answer.returncode == 0 else answer.stderr.strip()
        done.append((session["status"], session["context"] - len(prompt), mode, len(session["segments"]), what))
    return choices_of(client), done


def margin(cluster, tokens):
    """How much the best logit after these tokens is above the next."""
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "logprobs": 2}
    call = urllib.request.Request(f"http://{cluster.http}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=60) as answer:
        top = json.load(answer)["choices"][0]["logprobs"]["top_logprobs"][0]
    best, second = sorted(top.values(), reverse=True)[:2]
    return best - second


def judged(cluster, seed, planned, expected, found, done):
    """Whether a stream needed an excuse; without one that holds it fails."""
    prompt, _, greedy, _ = planned
    assert len(found) == len(expected), f"seed {seed}: {len(found)} choices"
    for number, (theirs, ours) in enumerate(zip(found, expected)):
        if theirs == ours:
            continue
        at = next((at for at, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1]), min(len(theirs), len(ours)))
        near = margin(cluster, prompt + ours[:at]) if greedy and at < min(len(theirs), len(ours)) else math.inf
        told = f"seed {seed}, choice {number}: token {at} of {len(ours)} is another, margin {near:.1e}; moves {done}"
        if near > MARGIN:
            raise AssertionError(told)
        print(f"excused: {told}")
        return True
    return False


def random_schedules(cluster, count, first):
    """Runs them, some at once."""
    names = [replica["replica"] for replica in cluster.replicas]
    tally, excused, times = collections.Counter(), 0, collections.defaultdict(list)

    def run(seed):
        planned = schedule(seed, len(names))
        prompt, options, _, moves = planned
        expected = choices_of(cluster.generate("--json", *options))
        return seed, planned, expected, *moved(cluster, board, f"moved-{seed}", names, prompt, options, moves)

    with Board(cluster) as board, concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for seed, planned, expected, found, done in pool.map(run, range(first, first + count)):
            excused += judged(cluster, seed, planned, expected, found, done)
            for status, _, mode, segments, what in done:
                if isinstance(what, str):
                    assert any(known in what.lower() for known in NOT_MOVED), f"seed {seed}: a move failed: {what}"
                    tally["not moved"] += 1
                    continue
                assert what["mode"] == mode, f"seed {seed}: moved {what['mode']} instead of {mode}"
                assert mode == "whole" or what["page_bytes"] == 0, f"seed {seed}: a split move took pages along: {what}"
                tally[mode] += 1
                tally["in the prompt"] += status == "prefill"
                tally["from several homes"] += segments > 2
                phases = {"stall": what["stall_ms"], **{phase.removesuffix("_ms"): ms for phase, ms in what["phases"].items()}}
                for phase, ms in phases.items():
                    times[f"{mode}, {phase}"].append(ms)
    print(f"{count} schedules from seed {first}: {dict(tally)}, {excused} excused", flush=True)
    for what, values in sorted(times.items()):
        print(f"ms of a move, {what}: median {sorted(values)[len(values) // 2]:.1f}, most {max(values):.1f}", flush=True)
    assert tally["split"] and tally["whole"] and tally["in the prompt"] and tally["from several homes"], "some kind of move is missing"
    assert excused <= max(1, EXCUSED * count), f"{excused} of {count} needed an excuse"


def all_free(cluster):
    """All slots and pages come back."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        replicas = cluster.ask("replicas")
        held = [one for one in replicas if one["slots_free"] != one["slots_total"] or one["pages_free"] != one["pages_total"]]
        if not held:
            return
        assert time.monotonic() < end, f"not free: {held}"


def latents_follow(cluster):
    """A long session that moves without its latents has them all at its owner in the end, and says what it would have said."""
    names = [replica["replica"] for replica in cluster.replicas]
    options = ["--tokens", ",".join(str(3 + 7 * at % 200) for at in range(2500)), "--max-tokens", 4000, "--temperature", 0]
    expected = choices_of(cluster.generate("--json", *options))
    with Board(cluster) as board:
        client = cluster.generate("--json", "--request-id", "followed", *options)
        mine = lambda sessions: next((one for one in sessions if one["request_id"] == "followed"), None)
        begun = lambda sessions: (one := mine(sessions)) and (one if one["context"] > 2600 else None)
        session = board.wait_for("session that decodes", begun, client)
        target = next(name for name in names if name != session["owner"])
        cluster.ask("migrate", session["session"], "--to", target, "--mode", "split")
        local = lambda sessions: (one := mine(sessions)) and (
            one if one["owner"] == target and all(part["home"] == target for part in one["segments"]) else None)
        arrived = board.wait_for("session with all its latents", local, client)
    found = choices_of(client)
    assert arrived is not None, "the session ended before its latents were there"
    assert found == expected, "the stream is another after its latents followed"
    print(f"latents followed: moved at {session['context']} positions, all local at {arrived['context']}", flush=True)


def deaths(binary, model, device):
    """Sources that are killed at different moments of a handoff: the stream goes on as it would have, at whoever has it."""
    options = ["--replicas", 4, "--tp", 1, "--state-slots", 8, "--latent-pages", 256, "--max-model-len", 4096]
    request = ["--tokens", ",".join(str(3 + 5 * at % 200) for at in range(300)), "--max-tokens", 600, "--temperature", 0]
    with Cluster(binary, model, device, *options, "--move-grace", 2) as cluster, Board(cluster) as board:
        expected = choices_of(cluster.generate("--json", *request))
        pids = {replica["replica"]: replica["pids"] for replica in cluster.replicas}
        for number, after_ms in enumerate([6, 12, 20]):
            name = f"outlives-{number}"
            client = cluster.generate("--json", "--request-id", name, *request)
            mine = lambda sessions: next((one for one in sessions if one["request_id"] == name and one["context"] > 310), None)
            session = board.wait_for("session", mine, client)
            source = session["owner"]
            target = next(other for other in pids if other != source)
            line = [binary, "migrate", "--router", cluster.router, session["session"], "--to", target]
            move = subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            time.sleep(after_ms / 1e3)
            for pid in pids.pop(source):
                os.kill(pid, signal.SIGKILL)
            found = choices_of(client)
            said = move.communicate(timeout=60)[0].strip().splitlines()
            assert found == expected, f"another stream after {source} was killed {after_ms} ms after its order"
            print(f"{source} killed {after_ms} ms after its order to hand over to {target}: {said[0][:160] if said else 'silent'}", flush=True)


def other_devices(binary, model, device):
    """Between a CPU and a device: as on the CPU alone in the same type; in another one refused, and the session goes on."""
    options = ["--state-slots=4", "--latent-pages=256", "--max-model-len=4096"]
    prompt = ",".join(str(3 + 5 * at % 200) for at in range(150))
    request = ["--tokens", prompt, "--max-tokens", 300, "--temperature", 0]
    with Fleet(binary, model, {"cpu": ("cpu", "fp32", [])}, *options) as fleet:
        expected = choices_of(fleet.generate("--json", *request))
    mine = lambda sessions: next((one for one in sessions if one["request_id"] == "visits" and one["context"] > 150), None)
    for dtype in ["fp32", "bf16"]:
        replicas = {"cpu": ("cpu", "fp32", []), "device": (device, dtype, [])}
        with Fleet(binary, model, replicas, *options) as fleet, Board(fleet) as board:
            client = fleet.generate("--json", "--request-id", "visits", *request)
            session = board.wait_for("session", mine, client)
            course = [session["owner"]]
            for mode in ["split", "whole", "split"]:
                target = "device" if course[-1] == "cpu" else "cpu"
                answer = fleet.tell("migrate", session["session"], "--to", target, "--mode", mode)
                if dtype == "fp32":
                    assert answer.returncode == 0, answer.stderr
                    course.append(target)
                else:
                    said = answer.stderr.lower()
                    assert answer.returncode == 1 and "bf16" in said, f"not refused for its type: {answer}"
            found = choices_of(client)
        if dtype == "fp32":
            assert found == expected, f"another stream after {course}"
            print(f"{len(found[0])} tokens as on the CPU alone, over {' '.join(course)}", flush=True)
        else:
            # What a device says in bf16 need not be what a CPU says in float32.
            assert len(found[0]) == 300 and (course == ["device"] or found == expected), "another stream after refused moves"
            print(f"refused between fp32 and bf16, from {course[0]}: {answer.stderr.strip()[:240]}")


def main():
    binary, model, device, *more = sys.argv[1:]
    count, first = int(more[0]) if more else 40, int(more[1]) if len(more) > 1 else 1
    options = ["--replicas", 3, "--tp", 1, "--state-slots", 32, "--latent-pages", 2048, "--max-model-len", 8192]
    with Cluster(binary, model, device, *options, "--token-budget", 32, "--pages-follow", "never", "--move-grace", 2) as cluster:
        random_schedules(cluster, count, first)
        all_free(cluster)
        assert not device.startswith("cuda") or "piece=" in cluster.said(), "no step with remote rows ran in recorded pieces"
    with Cluster(binary, model, device, *options, "--move-grace", 2) as cluster:
        latents_follow(cluster)
        all_free(cluster)
    deaths(binary, model, device)
    other_devices(binary, model, device)


if __name__ == "__main__":
    main()
