"""`perigee chat` against `perigee up`: turns in, answers and figures out, the history kept."""
import json
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python/serving"))

from cluster import Cluster
from test_serving import binary


def chat(cluster, lines, *options):
    command = [cluster.binary, "chat", "--router", cluster.info["grpc"], "--max-tokens", "12", "--seed", "4", *options]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60, check=False)


def test_a_conversation_keeps_its_history_and_tells_its_figures():
    with Cluster(binary(), "--tp", "1", "--max-model-len", "512") as cluster:
        result = chat(cluster, "Hello\n\nAgain\n/quit\nnever sent\n")
        assert result.returncode == 0, result.stderr
        figures = re.findall(r"s-[0-9a-f]{32}: 12 tokens from replica-[01]; TTFT [0-9.]+ ms, TPOT [0-9.]+ ms",
                             result.stderr)
        assert len(figures) == 2, result.stderr
        answers = [json.loads(line) for line in chat(cluster, "Hello\nAgain\n/new\nHello\n", "--json").stdout.splitlines()]
        first, second, anew = answers
        assert first["choices"][0]["text"] == anew["choices"][0]["text"], "/new forgets"
        prompts = [answer["choices"][0]["prompt_tokens"] for answer in answers]
        assert prompts[0] == prompts[2] < prompts[1], "the second turn has the first before it"
        with_system = chat(cluster, "Hello\n", "--json", "--system", "Be brief.")
        assert json.loads(with_system.stdout)["choices"][0]["prompt_tokens"] > prompts[0]
        refused = chat(cluster, "x" * 600 + "\n")
        assert refused.returncode == 1 and "messages" in refused.stderr, refused.stderr
