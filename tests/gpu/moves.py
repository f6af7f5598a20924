"""Sessions that change replicas on a device: a running stream is moved to and fro between two replicas, split and whole, and
its tokens must be those of the same request undisturbed, in float32, greedy and drawn.

usage: moves.py PERIGEE MODEL DEVICE
"""
import itertools
import json
import sys
import time

from cluster import Cluster

PROMPT, TOKENS, MOVES, WAIT_SECONDS = 600, 6000, 6, 60


def session_of(cluster):
    """The only session, once one generates."""
    sessions = [session for session in cluster.ask("sessions") if session["status"] == "decode"]
    return sessions[0] if sessions else None


def wait_for(what, ready):
    """What `ready` gives, once it gives something."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        if (found := ready()) is not None:
            return found
    raise AssertionError(f"no {what} within {WAIT_SECONDS} s")


def request(seed):
    prompt = ",".join(str(3 + 7 * at % 200) for at in range(PROMPT))
    drawn = ["--temperature", 0] if seed is None else ["--temperature", 0.9, "--top-p", 0.95, "--seed", seed]
    return ["--tokens", prompt, "--max-tokens", TOKENS, *drawn]


def tokens_of(client):
    out, error = client.communicate(timeout=300)
    assert client.returncode == 0, error
    return json.loads(out)["choices"][0]["tokens"]


def moved(cluster, seed, modes):
    """Tokens of a request whose session is moved at once whenever it has made a step where it is; and how many moves that were."""
    client = cluster.generate("--json", *request(seed))
    names = [replica["replica"] for replica in cluster.replicas]
    context, done = 0, []
    for mode in itertools.islice(itertools.cycle(modes), MOVES):
        def further():
            session = session_of(cluster)
            return session if session and session["context"] > max(context, PROMPT) else None
        session = wait_for(f"session beyond {context} positions", further)
        context = session["context"]
        target = next(name for name in names if name != session["owner"])
        cluster.ask("migrate", session["session"], "--to", target, "--mode", mode)
        done.append((context, mode))
    return tokens_of(client), done


def main():
    binary, model, device = sys.argv[1:]
    options = ["--replicas", 2, "--tp", 1, "--state-slots", 8, "--latent-pages", 512, "--max-model-len", 8192]
    with Cluster(binary, model, device, *options) as cluster:
        for seed, modes in [(None, ["split"]), (7, ["split", "whole"]), (None, ["whole"])]:
            expected = tokens_of(cluster.generate("--json", *request(seed)))
            found, done = moved(cluster, seed, modes)
            if found != expected:
                differ = next(at for at, (a, b) in enumerate(zip(found, expected)) if a != b)
                raise AssertionError(f"token {differ} of {len(expected)} is another after the moves {done}")
            print(f"{len(found)} tokens as undisturbed, seed {seed}; moved at {', '.join(f'{at} {mode}' for at, mode in done)}")
        for replica in cluster.ask("replicas"):
            assert replica["slots_free"] == replica["slots_total"], f"slots are not free: {replica}"


if __name__ == "__main__":
    main()
