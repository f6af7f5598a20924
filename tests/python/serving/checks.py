"""What any gRPC client may rely on, checked from outside against a running cluster. Each function is one check."""
import json
import os
import signal
import time

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster import get, until

METRICS_OF_ROUTER = """perigee_ttft_seconds perigee_tpot_seconds perigee_requests_running perigee_requests_waiting
    perigee_tokens_total perigee_migrations_total perigee_migration_stall_seconds
    perigee_migration_bytes_total""".split()
METRICS_OF_REPLICA = """perigee_queue_seconds perigee_step_seconds perigee_requests_running perigee_requests_waiting
    perigee_tokens_total perigee_state_slots perigee_latent_pages perigee_preemptions_total
    perigee_migration_bytes_total perigee_remote_attention_seconds perigee_prefix_tokens_total""".split()


class Client:
    """The generated stubs on one channel."""

    def __init__(self, channel, modules):
        self.pb, inference_grpc, self.cluster_pb, cluster_grpc = modules
        self.inference = inference_grpc.InferenceStub(channel)
        self.operator = cluster_grpc.ClusterStub(channel)

    def generate(self, timeout=60, **fields):
        return self.inference.Generate(self.pb.GenerateRequest(**fields), timeout=timeout)

    def sampling(self, **fields):
        return self.pb.SamplingParams(**fields)

    def tokens(self, **fields):
        """The tokens of each choice; checks indices and ends on the way."""
        choices, ended = {}, set()
        for response in self.generate(**fields):
            tokens = choices.setdefault(response.choice, [])
            assert response.choice not in ended, "a response after the end"
            if response.HasField("token_id"):
                assert response.index == len(tokens), (response.index, len(tokens))
                tokens.append(response.token_id)
            if response.finish_reason:
                ended.add(response.choice)
        assert ended == set(choices), "not all choices ended"
        return choices

    def replicas(self):
        return self.operator.ListReplicas(self.cluster_pb.ListReplicasRequest()).replicas

    def is_idle(self):
        return all(
            info.running == info.waiting == 0
            and info.slots_free == info.slots_total
            and info.pages_free == info.pages_total
            for info in self.replicas()
        )


def refused(code, call):
    """The error of a call that must fail with a code."""
    try:
        answer = call()
        if hasattr(answer, "__next__"):
            list(answer)
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()}: {error.details()}"
        return error
    raise AssertionError(f"expected {code}")


def details_of(error):
    """The encoded google.rpc.Status that travels with an error."""
    return dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")


def tokens_come_in_order_and_repeat_by_seed(client, _):
    sampling = client.sampling(temperature=1.0, seed=7)
    first = client.tokens(token_ids=[1, 2, 3], sampling=sampling, max_tokens=30)
    again = client.tokens(token_ids=[1, 2, 3], sampling=sampling, max_tokens=30)
    other = client.tokens(token_ids=[1, 2, 3], sampling=client.sampling(temperature=1.0, seed=8), max_tokens=30)
    assert first == again and first != other and 0 < len(first[0]) <= 30


def responses_tell_where_they_come_from(client, running):
    sampling = client.sampling(n=2, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    request = {"token_ids": [4, 5, 6, 7], "sampling": sampling, "max_tokens": 8, "request_id": "python-1"}
    responses = list(client.generate(**request))
    names = {replica["replica"] for replica in running.info["replicas"]}
    for choice in range(2):
        own = [response for response in responses if response.choice == choice]
        first, last = own[0], own[-1]
        assert first.request_id == "python-1" and first.HasField("seed") and not own[1].HasField("seed")
        assert len(first.prompt_logprobs) == 4 and not first.prompt_logprobs[0].HasField("chosen")
        assert [position.chosen.token_id for position in first.prompt_logprobs[1:]] == [5, 6, 7]
        assert all(len(position.top) == 2 for position in first.prompt_logprobs[1:])
        assert all(len(response.logprobs.top) == 3 for response in own if response.HasField("token_id"))
        assert all(response.logprobs.chosen.token_id == response.token_id for response in own if response.HasField("token_id"))
        assert last.finish_reason == client.pb.FINISH_REASON_LENGTH
        assert (last.usage.prompt, last.usage.completion) == (4, 8)
        assert {response.replica for response in own} <= names and {response.epoch for response in own} == {1}
        assert len({response.session_id for response in own}) == 1
    assert responses[0].seed == next(response.seed for response in responses if response.choice == 1)


def text_goes_in_and_out(client, _):
    text = "Grüße, 世界 <|eos|>"
    tokens = client.inference.Tokenize(client.pb.TokenizeRequest(text=text)).token_ids
    assert client.inference.Detokenize(client.pb.DetokenizeRequest(token_ids=tokens)).text == text
    greedy = client.sampling(temperature=0.0, ignore_eos=True)
    by_text = list(client.generate(text=text, sampling=greedy, max_tokens=20))
    by_tokens = client.tokens(token_ids=tokens, sampling=greedy, max_tokens=20)
    assert [response.token_id for response in by_text if response.HasField("token_id")] == by_tokens[0]
    whole = "".join(response.text for response in by_text)
    drawn = client.inference.Detokenize(client.pb.DetokenizeRequest(token_ids=by_tokens[0])).text
    assert whole == drawn, (whole, drawn)


def stop_strings_and_tokens_end_generation(client, _):
    greedy = client.sampling(temperature=0.0, ignore_eos=True)
    responses = list(client.generate(token_ids=[10, 20, 30], sampling=greedy, max_tokens=40))
    tokens = [response.token_id for response in responses if response.HasField("token_id")]
    stopping = client.sampling(temperature=0.0, ignore_eos=True, stop_token_ids=[tokens[5]])
    cut = list(client.generate(token_ids=[10, 20, 30], sampling=stopping, max_tokens=40))
    assert cut[-1].finish_reason == client.pb.FINISH_REASON_STOP
    assert sum(response.HasField("token_id") for response in cut) <= 6
    text = "".join(response.text for response in responses)
    stop = next(character for character in text if character != "\ufffd" and character.isprintable())
    cut = list(client.generate(token_ids=[10, 20, 30], sampling=greedy, max_tokens=40, stop=[stop]))
    assert cut[-1].finish_reason == client.pb.FINISH_REASON_STOP
    assert "".join(response.text for response in cut) == text[: text.index(stop)]


def scores_are_the_prompts_logprobs(client, _):
    tokens = [(7 * i) % 500 for i in range(200)]
    scores = client.inference.Score(client.pb.ScoreRequest(token_ids=tokens))
    assert len(scores.logprobs) == 199 and all(score < 0 for score in scores.logprobs)
    assert (scores.usage.prompt, scores.usage.completion) == (200, 0)
    sampling = client.sampling(prompt_logprobs=0)
    first = next(client.generate(token_ids=tokens, sampling=sampling, max_tokens=1))
    generated = [position.chosen.logprob for position in first.prompt_logprobs[1:]]
    assert max(abs(a - b) for a, b in zip(scores.logprobs, generated)) < 1e-4


def bad_fields_are_named(client, _):
    cases = {
        "token_ids": {},
        "text": {"text": "a", "token_ids": [1]},
        "max_tokens": {"token_ids": [1], "max_tokens": 0},
        "priority": {"token_ids": [1], "priority": 1000},
        "stop": {"token_ids": [1], "stop": ["a"] * 17},
        "cache_salt": {"token_ids": [1], "cache_salt": "s" * 129},
        "request_id": {"token_ids": [1], "request_id": "a\nb"},
        "sampling.temperature": {"token_ids": [1], "sampling": client.sampling(temperature=float("nan"))},
        "sampling.top_p": {"token_ids": [1], "sampling": client.sampling(top_p=1.5)},
        "sampling.n": {"token_ids": [1], "sampling": client.sampling(n=1_000_000)},
        "sampling.logprobs": {"token_ids": [1], "sampling": client.sampling(logprobs=1_000_000)},
        "sampling.logit_bias": {"token_ids": [1], "sampling": client.sampling(logit_bias={100_000_000: 1.0})},
    }
    for field, request in cases.items():
        error = refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: client.generate(**request))
        assert error.details().startswith(f"{field}: "), error.details()
        details = details_of(error)
        assert b"google.rpc.BadRequest" in details and field.encode() in details, details


def large_messages_and_headers_are_refused(client, _):
    large = client.pb.GenerateRequest(token_ids=[1] * 20_000_000)
    error = refused_any(lambda: list(client.inference.Generate(large, timeout=60)))
    assert error.code() in (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED), error
    metadata = [("x-large", "a" * 100_000)]
    request = client.pb.GetModelInfoRequest()
    refused_any(lambda: client.inference.GetModelInfo(request, metadata=metadata, timeout=20))
    assert client.inference.GetModelInfo(request, timeout=20).vocab_size > 0, "the router goes on"


def refused_any(call):
    try:
        call()
    except grpc.RpcError as error:
        return error
    raise AssertionError("expected a refusal")


def calls_without_what_they_need_are_refused(client, _):
    refused(grpc.StatusCode.INVALID_ARGUMENT, lambda: client.inference.Resume(client.pb.ResumeRequest()))
    nobody = client.cluster_pb.DrainRequest(replica="nobody")
    refused(grpc.StatusCode.NOT_FOUND, lambda: client.operator.Drain(nobody))


def a_cancelled_call_frees_everything(client, _):
    long = {"token_ids": [1, 2, 3], "max_tokens": 20_000, "sampling": client.sampling(ignore_eos=True)}
    calls = [client.generate(**long) for _ in range(8)]
    for call in calls:
        next(call)
    assert sum(info.running for info in client.replicas()) + sum(info.waiting for info in client.replicas()) > 0
    for call in calls:
        call.cancel()
    until(client.is_idle, "slots and pages are free after cancellations", seconds=10)
    flushed = client.operator.FlushCache(client.cluster_pb.FlushCacheRequest())
    assert len(flushed.replicas) == 2


def the_deadline_ends_a_call(client, _):
    long = {"token_ids": [1, 2, 3], "max_tokens": 20_000, "sampling": client.sampling(ignore_eos=True)}
    started = time.monotonic()
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: client.generate(timeout=0.5, **long))
    assert time.monotonic() - started < 5
    until(client.is_idle, "slots and pages are free after a deadline", seconds=10)


def abort_ends_a_request_by_name(client, _):
    long = {"token_ids": [1, 2], "max_tokens": 20_000, "sampling": client.sampling(ignore_eos=True, n=2)}
    call = client.generate(request_id="to-abort", **long)
    next(call)
    sessions = client.operator.ListSessions(client.cluster_pb.ListSessionsRequest()).sessions
    own = sorted(session.session for session in sessions if session.request_id == "to-abort")
    assert len(own) == 2 and all(session.segments for session in sessions if session.status == "decode")
    told = client.inference.Abort(client.pb.AbortRequest(request_id="to-abort"))
    assert sorted(told.session_ids) == own
    ends = [response.finish_reason for response in call if response.finish_reason]
    assert ends == [client.pb.FINISH_REASON_ABORTED] * 2
    refused(grpc.StatusCode.NOT_FOUND, lambda: client.inference.Abort(client.pb.AbortRequest(request_id="to-abort")))


def health_speaks_the_standard(client, running):
    endpoints = [running.info["grpc"], *(info.endpoint for info in client.replicas())]
    for endpoint in endpoints:
        with running.channel(endpoint) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ["", "perigee.v1.Inference"]:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING, (endpoint, service)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=10)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
            unknown = health_pb2.HealthCheckRequest(service="no.such.Service")
            refused(grpc.StatusCode.NOT_FOUND, lambda: stub.Check(unknown, timeout=10))


def reflection_is_enough_to_call(client, running):
    for endpoint in [running.info["grpc"], *(info.endpoint for info in client.replicas())]:
        with running.channel(endpoint) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            services = set(database.get_services())
            assert "perigee.v1.Inference" in services and "grpc.health.v1.Health" in services, services
            pool = descriptor_pool.DescriptorPool(database)
            method = pool.FindServiceByName("perigee.v1.Inference").FindMethodByName("GetModelInfo")
            call(channel, method, {})
    with running.channel() as channel:
        pool = descriptor_pool.DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName("perigee.v1.Inference").FindMethodByName("Generate")
        responses = call(channel, method, {"token_ids": [1, 2, 3], "max_tokens": 5})
        assert [response.index for response in responses if response.HasField("token_id")][:1] == [0]
        assert "perigee.v1.Cluster" in set(ProtoReflectionDescriptorDatabase(channel).get_services())
        # Newer tools ask for version 1, whose messages are the same.
        ask = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        question = reflection_pb2.ServerReflectionRequest(list_services="*")
        names = {service.name for service in next(ask(iter([question]))).list_services_response.service}
        assert "perigee.v1.Inference" in names, names


def call(channel, method, fields):
    """A call of which nothing is known but its descriptor."""
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    connect = channel.unary_stream if method.server_streaming else channel.unary_unary
    path = f"/{method.containing_service.full_name}/{method.name}"
    answer = connect(path, request_class.SerializeToString, response_class.FromString)(request_class(**fields), timeout=30)
    return list(answer) if method.server_streaming else answer


def http_has_health_and_metrics(client, running):
    client.tokens(token_ids=[1, 2], max_tokens=4)
    assert get(running.info["http"], "/health") == (200, "ok\n")
    status, text = get(running.info["http"], "/metrics")
    assert status == 200
    for name in METRICS_OF_ROUTER:
        assert f"# TYPE {name} " in text, f"{name} is missing"
    assert "perigee_ttft_seconds_count 0" not in text
    for replica in running.info["replicas"]:
        status, text = get(replica["http"], "/metrics")
        assert status == 200
        for name in METRICS_OF_REPLICA:
            assert f"# TYPE {name} " in text, f"{name} is missing on {replica['replica']}"


def commands_print_json(client, running):
    status, output, _ = running.command("replicas", "--json")
    replicas = json.loads(output)
    assert status == 0 and [replica["status"] for replica in replicas] == ["ready", "ready"]
    keys = """replica incarnation endpoint tp device status weight_bytes slots_free slots_total pages_free pages_total
        running waiting homes step_ms""".split()
    assert all(key in replica for key in keys for replica in replicas)
    assert [len(replica["weight_bytes"]) for replica in replicas] == [replica["tp"] for replica in replicas]

    generate = ["generate", "--tokens", "1,2,3", "--max-tokens", "6", "--temperature", "0", "--ignore-eos", "--json"]
    status, output, _ = running.command(*generate)
    answer = json.loads(output)
    greedy = client.tokens(token_ids=[1, 2, 3], sampling=client.sampling(temperature=0.0, ignore_eos=True), max_tokens=6)
    assert status == 0 and answer["choices"][0]["tokens"] == greedy[0]

    long = {"token_ids": [1, 2, 3], "max_tokens": 20_000, "sampling": client.sampling(ignore_eos=True)}
    stream = client.generate(**long)
    session = next(stream).session_id
    status, output, _ = running.command("sessions", "--json")
    listed = {entry["session"]: entry for entry in json.loads(output)}
    assert status == 0 and set(listed[session]) >= {"session", "owner", "epoch", "status", "context", "segments"}
    assert set(listed[session]["segments"][0]) == {"home", "first", "tokens"}
    stream.cancel()

    status, _, errors = running.command("generate", "--tokens", "999999")
    assert status == 1 and "token_ids" in errors
    assert running.command("generate")[0] == 2


def streams_of_a_killed_process_go_on_elsewhere(client, running):
    """Last: it costs a replica."""
    long = {"token_ids": [1, 2, 3], "max_tokens": 20_000, "sampling": client.sampling(ignore_eos=True)}
    names = {replica["replica"] for replica in running.info["replicas"]}
    # Where a stream goes depends on how fast the replicas are just then.
    calls, owners = [], []
    while len(calls) < 4 or set(owners) != names:
        assert len(calls) < 16, f"all streams are on {set(owners)}"
        calls.append(client.generate(**long))
        owners.append(next(calls[-1]).replica)
    victim = next(replica for replica in running.info["replicas"] if replica["replica"] == owners[0])
    killed = time.monotonic()
    os.kill(victim["pids"][1], signal.SIGKILL)
    for call, owner in zip(calls, owners):
        if owner != victim["replica"]:
            next(call)
            call.cancel()
            continue
        # The other replica goes on with it, in a later epoch; what was on its way comes first.
        moved = next(response for response in call if response.replica != victim["replica"])
        assert moved.epoch > 1 and moved.index > 0, moved
        assert time.monotonic() - killed < 2.5, "it goes on, but late"
        call.cancel()
    for _ in range(4):
        client.tokens(token_ids=[5, 6], max_tokens=5)
    until(client.is_idle, "the other replica is free again", seconds=10)


CHECKS = [
    tokens_come_in_order_and_repeat_by_seed,
    responses_tell_where_they_come_from,
    text_goes_in_and_out,
    stop_strings_and_tokens_end_generation,
    scores_are_the_prompts_logprobs,
    bad_fields_are_named,
    large_messages_and_headers_are_refused,
    calls_without_what_they_need_are_refused,
    a_cancelled_call_frees_everything,
    the_deadline_ends_a_call,
    abort_ends_a_request_by_name,
    health_speaks_the_standard,
    reflection_is_enough_to_call,
    http_has_health_and_metrics,
    commands_print_json,
    streams_of_a_killed_process_go_on_elsewhere,
]
