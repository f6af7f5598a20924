"""Steps that are launched before the one before is read: streams of different lengths at once over one replica on a device give
what golden case and CPUs give, where every step is read first, in float32, greedy and drawn.

usage: ahead.py PERIGEE CASE_DIR DEVICE
"""
import json
import pathlib
import sys

from cluster import Cluster
from safetensors.numpy import load_file

DRAWN, ROOM = 6, 100


def requests(case):
    """Options of every request: the greedy ones of the case, then drawn ones of other lengths."""
    expected = load_file(case / "expected.safetensors")
    prompts = {name: values.tolist() for name, values in expected.items() if name.startswith("prompt_")}
    greedy = {name: expected[name.replace("prompt", "greedy")].tolist() for name in prompts}
    asked = [(prompts[name], len(greedy[name]), ["--temperature", 0]) for name in prompts]
    for seed, prompt in zip(range(DRAWN), list(prompts.values()) * DRAWN):
        asked.append((prompt, 20 + 13 * seed, ["--temperature", 0.9, "--top-p", 0.95, "--seed", seed]))
    longest = max(len(prompt) for prompt in prompts.values()) + ROOM
    return [[*options, "--tokens", ",".join(map(str, prompt)), "--max-tokens", count] for prompt, count, options in asked], \
        list(greedy.values()), longest


def answers(binary, case, device, asked, longest):
    """The tokens of all requests, asked at once."""
    with Cluster(binary, case, device, "--replicas", 1, "--tp", 1, "--state-slots", len(asked), "--max-batch", len(asked),
                 "--max-model-len", longest, "--latent-pages", len(asked) * (longest // 64 + 2)) as replica:
        clients = [replica.generate("--json", *options) for options in asked]
        found = [client.communicate(timeout=120) for client in clients]
        for client, (_, error) in zip(clients, found):
            assert client.returncode == 0, error
    return [json.loads(out)["choices"][0]["tokens"] for out, _ in found]


def main():
    binary, case, device = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
    asked, greedy, longest = requests(case)
    found, stepwise = (answers(binary, case, where, asked, longest) for where in (device, "cpu"))
    for index, tokens in enumerate(found[:len(greedy)]):
        assert tokens == greedy[index], f"greedy stream {index}: {tokens} instead of {greedy[index]}"
    for index, (tokens, others) in enumerate(zip(found, stepwise)):
        assert tokens == others, f"stream {index}: {tokens}, on CPUs {others}"
    print(f"{case.name}: {len(found)} streams, {sum(map(len, found))} tokens as expected")


if __name__ == "__main__":
    main()
