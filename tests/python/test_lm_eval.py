"""lm-eval itself, unmodified, against `perigee up`: its log-likelihoods are those of Score.

Needs lm-eval with its `api` extra, which brings torch and transformers: where neither this interpreter nor the one that
PERIGEE_LM_EVAL names has it, this is not run.
"""
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python/serving"))

from cluster import Cluster, stubs
from test_serving import binary

PYTHON = os.environ.get("PERIGEE_LM_EVAL") or (sys.executable if importlib.util.find_spec("lm_eval") else None)
NOT_RUN = "not run: lm-eval is not installed (PERIGEE_LM_EVAL names an interpreter that has it)"
pytestmark = pytest.mark.skipif(PYTHON is None, reason=NOT_RUN)

DOCUMENTS = [{"question": f"What is {a} plus {b}? Grüße 你好", "choices": [f"{a + b}", f"{a * b + 1}", "none"]}
             for a, b in [(0, 0), (1, 2), (3, 5), (8, 13)]]
COMMON = {"dataset_path": "json", "test_split": "test"}
TASKS = {
    "choices": {"output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_choice": "{{choices}}", "doc_to_target": 0, "metric_list": [{"metric": "acc"}]},
    "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
                "metric_list": [{"metric": "bits_per_byte"}]},
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Documents and answers of both tasks as lm-eval wrote them, and the Score of a context and its continuation."""
    folder = tmp_path_factory.mktemp("lm_eval")
    subprocess.run([binary(), "init-model", "--model", "random:tiny", folder / "model"], check=True, stdout=subprocess.DEVNULL)
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **COMMON, **data, **task}))
    inference_pb2, inference_pb2_grpc, *_ = stubs()
    with Cluster(binary(), "--tp", "1", "--max-model-len", "4096", "--model", folder / "model") as cluster:
        options = {"model": "model", "base_url": f"http://{cluster.info['http']}/v1/completions",
                   "tokenizer_backend": "huggingface", "tokenizer": folder / "model", "num_concurrent": 4,
                   "max_retries": 1, "max_length": 4096}
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
        done = subprocess.run(
            [PYTHON, "-m", "lm_eval", "--model", "local-completions",
             "--model_args", ",".join(f"{name}={value}" for name, value in options.items()), "--tasks", ",".join(TASKS),
             "--include_path", folder, "--log_samples", "--output_path", folder / "out"],
            env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        with cluster.channel() as channel:
            inference = inference_pb2_grpc.InferenceStub(channel)

            def score(context, rest):
                """Sum over the rest; without a context it is after the token that begins texts."""
                tokens = tokenized(inference, inference_pb2, context) or [1]
                scores = inference.Score(inference_pb2.ScoreRequest(token_ids=tokens + tokenized(inference, inference_pb2, rest)))
                return sum(list(scores.logprobs)[len(tokens) - 1:])

            def written(name):
                (file,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
                return [json.loads(line) for line in file.read_text().splitlines()]

            yield {name: written(name) for name in TASKS}, score


def tokenized(inference, inference_pb2, text):
    return list(inference.Tokenize(inference_pb2.TokenizeRequest(text=text)).token_ids) if text else []


def test_choices_are_scored_as_by_score(samples):
    found, score = samples
    assert len(found["choices"]) == len(DOCUMENTS)
    for sample in found["choices"]:
        document = sample["doc"]
        context = f"Question: {document['question']}\nAnswer:"
        values = [float(answer[0][0]) for answer in sample["resps"]]
        assert values == pytest.approx([score(context, f" {choice}") for choice in document["choices"]], abs=1e-4)


def test_whole_texts_are_scored_as_by_score(samples):
    found, score = samples
    assert len(found["rolling"]) == len(DOCUMENTS)
    for sample in found["rolling"]:
        assert float(sample["resps"][0][0]) == pytest.approx(score("", sample["doc"]["question"]), abs=1e-4)
