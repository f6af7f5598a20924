"""One connected trace for every request, from its client to the ranks, across moves and lost replicas."""
import collections
import json
import os
import pathlib
import signal
import sys
import urllib.request

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "python/serving"))

from cluster import Cluster, stubs, until
from collector import Collector, unconnected
from test_serving import ROOT, binary

CLIENT_SPAN = "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def collector():
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("traces") / "log"


@pytest.fixture(scope="module")
def cluster(collector, log):
    options = ["--tp", "2", "--threads", "1", "--max-model-len", "4096", "--log", "info", "--log-format", "json",
               "--otlp-endpoint", collector.endpoint]
    with open(log, "w", encoding="utf-8") as lines, Cluster(binary(), *options, stderr=lines) as running:
        yield running


@pytest.fixture(scope="module")
def inference():
    return stubs()[:2]


def traceparent(number, flags="01"):
    return f"{number:032x}", f"00-{number:032x}-{CLIENT_SPAN}-{flags}"


def generate(cluster, inference, header, max_tokens):
    """Responses as they come, with exactly so many tokens."""
    messages, services = inference
    with cluster.channel() as channel:
        sampling = messages.SamplingParams(ignore_eos=True)
        request = messages.GenerateRequest(text="One trace", max_tokens=max_tokens, sampling=sampling)
        call = services.InferenceStub(channel).Generate(request, metadata=[("traceparent", header)])
        yield from call


def post(cluster, body, headers=()):
    request = urllib.request.Request(f"http://{cluster.info['http']}/v1/completions", json.dumps(body).encode(), dict(headers))
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def complete(collector, trace, counts):
    """The trace once it has so many spans of each name."""
    def found():
        spans = collector.spans(trace)
        return spans if collections.Counter(span.name for span in spans) == counts else None
    return until(found, f"{counts} of trace {trace}", seconds=30)


def check_documented(spans):
    """The page on telemetry has every span and attribute."""
    page = (ROOT / "deploy" / "telemetry.md").read_text()
    words = {span.name for span in spans} | {key for span in spans for key in span.attributes if not key.startswith("otel.")}
    assert {word for word in words if f"`{word}`" not in page} == set()


def ranks(spans, name="rank"):
    return sorted((span.service["perigee.replica"], span.service["perigee.rank"]) for span in spans if span.name == name)


def test_a_grpc_request_is_one_trace_from_client_to_ranks(cluster, collector, inference):
    trace, header = traceparent(0xa1)
    answer = list(generate(cluster, inference, header, max_tokens=20))
    name = "perigee.v1.Inference/Generate"
    spans = complete(collector, trace, {name: 1, "session": 1, "rank": 2})
    assert not unconnected(spans, CLIENT_SPAN)
    request = next(span for span in spans if span.name == name)
    assert request.parent == CLIENT_SPAN and request.service["service.name"] == "perigee-router"
    assert request.attributes["request_id"] == answer[0].request_id and request.events == ["request ended"]
    session = next(span for span in spans if span.name == "session")
    assert session.service["perigee.replica"] == answer[0].replica and session.attributes["completion_tokens"] == 20
    assert session.attributes["session"] == answer[0].session_id and session.attributes["first_token_ms"] > 0
    assert ranks(spans) == [(answer[0].replica, "0"), (answer[0].replica, "1")]
    # A step for every token, none a span.
    assert all(span.attributes["steps"] >= 20 for span in spans if span.name == "rank")


def test_http_requests_are_traces_too(cluster, collector):
    trace, header = traceparent(0xb2)
    post(cluster, {"prompt": ["a", "b"], "n": 2, "max_tokens": 4}, {"traceparent": header}.items())
    spans = complete(collector, trace, {"POST /v1/completions": 1, "session": 4, "rank": 8})
    assert not unconnected(spans, CLIENT_SPAN)


def test_a_trace_begins_here_where_the_client_has_none(cluster, collector, log):
    for headers in ({}, {"traceparent": "00-what-is-this-01"}):
        name = post(cluster, {"prompt": "a", "max_tokens": 2}, headers.items())["id"].removeprefix("cmpl-")
        line = until(lambda: ended(log, name), "its line in the log")
        spans = complete(collector, line["trace_id"], {"POST /v1/completions": 1, "session": 1, "rank": 2})
        assert not unconnected(spans, "") and sum(not span.parent for span in spans) == 1


def ended(log, request_id):
    lines = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    found = [line for line in lines if line["message"] == "request ended" and line["request_id"] == request_id]
    return found[0] if found else None


def test_a_request_that_is_not_sampled_leaves_its_id_in_the_log_only(cluster, collector, inference, log):
    trace, header = traceparent(0xc3, flags="00")
    request_id = list(generate(cluster, inference, header, max_tokens=2))[0].request_id
    assert until(lambda: ended(log, request_id), "its line")["trace_id"] == trace
    # What ended before it has been sent when a later trace has.
    later, header = traceparent(0xc4)
    list(generate(cluster, inference, header, max_tokens=2))
    complete(collector, later, {"perigee.v1.Inference/Generate": 1, "session": 1, "rank": 2})
    assert not collector.spans(trace)


def test_a_moved_session_stays_in_its_trace(cluster, collector, inference, log):
    trace, header = traceparent(0xd5)
    answer = generate(cluster, inference, header, max_tokens=3000)
    first = next(answer)
    target = next(replica["replica"] for replica in cluster.info["replicas"] if replica["replica"] != first.replica)
    status, _, error = cluster.command("migrate", first.session_id, "--to", target)
    assert status == 0, error
    next(response for response in answer if response.replica == target)
    answer.close()
    name = "perigee.v1.Inference/Generate"
    spans = complete(collector, trace, {name: 1, "session": 2, "rank": 4, "handoff": 1, "receive": 1})
    assert not unconnected(spans, CLIENT_SPAN)
    assert ranks(spans) == sorted((replica, rank) for replica in (first.replica, target) for rank in "01")
    assert ranks(spans, "receive") == [(target, "0")] and ranks(spans, "handoff") == [(first.replica, "0")]
    check_documented(spans)
    assert "session migration" in next(span for span in spans if span.name == name).events
    moved = [json.loads(line) for line in log.read_text().splitlines() if '"session migration"' in line]
    assert [line["trace_id"] for line in moved] == [trace]


def test_a_lost_replica_leaves_a_connected_trace(cluster, collector, inference):
    """The last test: it takes a replica away. What that had not sent is lost with it."""
    trace, header = traceparent(0xe6)
    answer = generate(cluster, inference, header, max_tokens=3000)
    first = next(answer)
    lost = next(replica for replica in cluster.info["replicas"] if replica["replica"] == first.replica)
    os.kill(lost["pids"][0], signal.SIGKILL)
    other = next(response for response in answer if response.replica != first.replica).replica
    answer.close()
    name = "perigee.v1.Inference/Generate"

    def replayed():
        spans = collector.spans(trace)
        names = collections.Counter(span.name for span in spans if span.service.get("perigee.replica") == other)
        return spans if names == {"session": 1, "rank": 2} and any(span.name == name for span in spans) else None
    spans = until(replayed, "the trace", seconds=30)
    assert not unconnected(spans, CLIENT_SPAN)
    assert "session replayed" in next(span for span in spans if span.name == name).events
