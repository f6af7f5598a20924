"""The official `openai` package, and what lm-eval's local-completions sends, against `perigee up`.

The model is random, so nothing is expected of what it says; a seed makes it say the same twice.
"""
import http.client
import json
import pathlib
import sys

import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python/serving"))

from cluster import Cluster, get, stubs, until
from test_serving import binary

MODEL = "random:tiny@0"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß Gott, 你好 👋 <|eos|>"}]


@pytest.fixture(scope="module")
def cluster():
    with Cluster(binary(), "--tp", "1", "--max-model-len", "4096") as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=f"http://{cluster.info['http']}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "perigee"


def test_completions_are_the_same_in_one_piece_and_streamed(client):
    asked = dict(model=MODEL, prompt="Once upon a time", max_tokens=40, seed=7, temperature=0.8)
    whole = client.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 40
    assert whole.usage.prompt_tokens == len("Once upon a time")
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert client.completions.create(**{**asked, "seed": 8}).choices[0].text != whole.choices[0].text


def test_prompts_and_choices_are_numbered(client):
    answer = client.completions.create(model=MODEL, prompt=["a", "bcd"], n=3, max_tokens=5, seed=1)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 30)
    assert len({choice.text for choice in answer.choices[:3]}) == 3


def test_stop_strings_end_a_text_wherever_tokens_end(client):
    """A token is a byte here, so every stop string of several characters goes over a border of tokens."""
    asked = dict(model=MODEL, prompt="x", max_tokens=200, seed=3)
    whole = client.completions.create(**asked).choices[0].text
    stop = next(whole[at:at + 3] for at in range(40, 150) if "\ufffd" not in whole[at:at + 3])
    for stream in (False, True):
        answer = client.completions.create(**asked, stop=[stop, "never"], stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[:whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_chat_has_roles_usage_and_logprobs(client):
    asked = dict(model=MODEL, messages=CHAT, max_completion_tokens=24, seed=5, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**asked)
    choice = whole.choices[0]
    assert (choice.message.role, choice.finish_reason, len(choice.logprobs.content)) == ("assistant", "length", 24)
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= token.top_logprobs[0].logprob <= 0
        assert bytes(token.bytes).decode(errors="replace") == token.token
    spelled = b"".join(bytes(token.bytes) for token in choice.logprobs.content if not token.token.startswith("<|"))
    assert spelled.decode(errors="replace") == choice.message.content
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == choice.message.content and chunks[-1].usage == whole.usage
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks
               if chunk.choices and chunk.choices[0].logprobs) == 24


def test_chat_takes_tools_and_several_choices(client):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    answer = client.chat.completions.create(model=MODEL, messages=CHAT, tools=tools, n=2, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]
    without = client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4)
    assert answer.usage.prompt_tokens > without.usage.prompt_tokens, "the template shows the tools"


def test_errors_have_openais_classes(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    for field, value in [("temperature", -1), ("top_p", 2), ("n", 99), ("stop", ["x"] * 17), ("max_tokens", 10**6)]:
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(model=MODEL, messages=CHAT, **{field: value})
        assert error.value.param == field, error.value
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model=MODEL, prompt="x" * (17 << 20))
    assert error.value.status_code == 413


def test_a_client_that_goes_away_ends_its_request(cluster):
    def running():
        lines = get(cluster.info["http"], "/metrics")[1].splitlines()
        gauges = ("perigee_requests_running ", "perigee_requests_waiting ")
        return sum(float(line.split()[1]) for line in lines if line.startswith(gauges))

    for stream in (False, True):
        connection = http.client.HTTPConnection(cluster.info["http"])
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": stream, "ignore_eos": True})
        connection.request("POST", "/v1/completions", body)
        until(lambda: running() == 1, "the request runs")
        connection.close()
        until(lambda: running() == 0, "the request ended", seconds=5)


def test_lm_evals_loglikelihood_is_that_of_score(cluster, client):
    """The requests of lm_eval.models.openai_completions.LocalCompletionsAPI and its way to read the answer, against Score.

    lm-eval itself needs torch and transformers, which would be most of what this repository installs.
    """
    inference_pb2, inference_pb2_grpc, *_ = stubs()
    cases = [(list(range(3, 23)), list(range(30, 37))), ([9], [8]), (list(b"context"), list(b" and a long continuation"))]
    payload = {"model": MODEL, "prompt": [context + rest for context, rest in cases], "temperature": 0, "max_tokens": 1,
               "logprobs": 1, "seed": 1234, "echo": True}
    answer = client.post("/completions", cast_to=object, body=payload)
    with cluster.channel() as channel:
        inference = inference_pb2_grpc.InferenceStub(channel)
        for choice, (context, rest) in zip(sorted(answer["choices"], key=lambda choice: choice["index"]), cases):
            logprobs = choice["logprobs"]["token_logprobs"][len(context):-1]
            top = choice["logprobs"]["top_logprobs"][len(context):-1]
            is_greedy = all(value == max(values.values()) for value, values in zip(logprobs, top))
            scores = inference.Score(inference_pb2.ScoreRequest(token_ids=context + rest)).logprobs
            assert logprobs == pytest.approx(list(scores)[len(context) - 1:], abs=1e-5)
            assert len(logprobs) == len(rest) and isinstance(is_greedy, bool)
    # generate_until, and the same scores without any token drawn.
    until_payload = {"prompt": [list(b"abc")], "model": MODEL, "max_tokens": 8, "temperature": 0, "stop": ["\n"],
                     "seed": 1234}
    assert len(client.post("/completions", cast_to=object, body=until_payload)["choices"]) == 1
    scored = client.post("/completions", cast_to=object, body={**payload, "max_tokens": 0})
    for one, other in zip(scored["choices"], answer["choices"]):
        assert one["logprobs"]["token_logprobs"] == other["logprobs"]["token_logprobs"][:-1]
