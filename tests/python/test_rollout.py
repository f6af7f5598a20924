"""A rolling update as Kubernetes would do it, on local processes: with the options, probes, preStop and grace periods that the
chart renders, all replicas are replaced one by one under 200 streams, of which none fails.

PERIGEE_BINARY names the program; it must be built with --features etcd. Needs etcd.
"""
import asyncio
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import grpc

for folder in ("helm", "python/serving"):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / folder))

import cluster  # noqa: E402  (the paths above come first)
import render  # noqa: E402
from test_local_cluster import free_ports  # noqa: E402
from test_serving import ROOT, binary  # noqa: E402

REPLICAS, STREAMS, TOKENS = 3, 200, 500
VALUES = {
    "worker": {"replicas": REPLICAS, "tp": 1, "device": "cpu",
               "extraArgs": ["--threads=1", "--state-slots=256", "--max-batch=256"]},
    "model": {"random": "tiny"},
}
PATIENCE = 120
# Programs of the images by name; the others are perigee itself.
PROGRAMS = {"perigee-ranks": str(ROOT / "deploy/images/perigee-ranks"), "sleep": "sleep"}


def pods():
    """Pod specifications of the router and of a replica."""
    found = {document["kind"]: document["spec"]["template"]["spec"] for document in render.documents(render.render(VALUES))
             if document["kind"] in ("Deployment", "StatefulSet")}
    return found["Deployment"], found["StatefulSet"]


class Container:
    """A pod's container as a process: its command with this machine's addresses for those of a cluster."""

    def __init__(self, pod, addresses, folder, name):
        self.grace = pod["terminationGracePeriodSeconds"]
        self.container = pod["containers"][0]
        self.http = addresses["http"]
        words = [PROGRAMS.get(word) or binary() for word in self.container["command"]]
        unused = set(addresses)
        for word in self.container["args"]:
            option = word.removeprefix("--").partition("=")[0]
            if word.startswith("--") and option in addresses:
                unused.discard(option)
                word = f"--{option}={addresses[option]}"
            words.append(word)
        assert not unused, f"the chart does not pass {unused}"
        with open(folder / f"{name}.log", "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(words, env={**os.environ, "PERIGEE": binary()}, stdout=log, stderr=log)

    async def answers(self, probe):
        path = self.container[probe]["httpGet"]["path"]
        deadline = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, (self.container["name"], probe)
            with contextlib.suppress(OSError):
                if (await asyncio.to_thread(cluster.get, self.http, path))[0] == 200:
                    return
            await asyncio.sleep(0.05)

    async def is_ready(self):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            await self.answers(probe)

    async def end(self):
        """preStop, SIGTERM, and a wait of as long as the pod may take; its exit status."""
        deadline = time.monotonic() + self.grace
        if hook := self.container.get("lifecycle", {}).get("preStop"):
            program, *words = hook["exec"]["command"]
            await asyncio.to_thread(subprocess.run, [PROGRAMS.get(program) or binary(), *words], check=True, timeout=self.grace,
                                    env={**os.environ, "PERIGEE_RANKS_PID": str(self.process.pid)})
            # What a hook leaves to do is left for SIGTERM: one that took the container with it would count as failed.
            assert self.process.poll() is None, self.container["name"]
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, deadline - time.monotonic())

    def kill(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


async def streams_until(over, stub, pb, number, begun):
    """Streams one behind the other, however fast they are, until an event is set."""
    while not over.is_set():
        await stream(stub, pb, number, begun)


async def stream(stub, pb, number, begun):
    """Reads a stream to its end: every index once and in order."""
    request = pb.GenerateRequest(token_ids=[1 + number, 2, 3], max_tokens=TOKENS,
                                 sampling=pb.SamplingParams(temperature=1.0, seed=number, ignore_eos=True))
    count, ends = 0, 0
    async for response in stub.Generate(request, timeout=PATIENCE * 2):
        if response.HasField("token_id"):
            assert response.index == count
            count += 1
            if count == 1:
                begun.release()
        ends += bool(response.finish_reason)
    assert (count, ends) == (TOKENS, 1)


async def roll(folder, started):
    pb, stubs, _, _ = cluster.stubs()
    port = free_ports()
    registry = f"etcd://127.0.0.1:{port}/rollout"
    etcd = subprocess.Popen(
        ["etcd", "--data-dir", folder / "etcd", "--log-level=error",
         "--listen-client-urls", f"http://127.0.0.1:{port}", "--advertise-client-urls", f"http://127.0.0.1:{port}",
         "--listen-peer-urls", f"http://127.0.0.1:{port + 1}"])
    started.callback(lambda: (etcd.kill(), etcd.wait()))
    router_pod, worker_pod = pods()

    def start(pod, addresses, name):
        container = Container(pod, {**addresses, "registry": registry}, folder, name)
        started.callback(container.kill)
        return container

    def replica(number):
        first = port + 20 + 10 * number
        places = {name: f"127.0.0.1:{first + offset}"
                  for offset, name in enumerate(("leader", "internal", "listen", "http"))}
        name = f"replica-{number}"
        return start(worker_pod, {**places, "replica": name, "advertise": "127.0.0.1"}, name)

    grpc_place = f"127.0.0.1:{port + 10}"
    router = start(router_pod, {"listen": grpc_place, "http": f"127.0.0.1:{port + 11}"}, "router")
    replicas = [replica(number) for number in range(REPLICAS)]
    for container in [*replicas, router]:
        await container.is_ready()

    async with grpc.aio.insecure_channel(grpc_place) as channel:
        begun, over = asyncio.Semaphore(0), asyncio.Event()
        stub = stubs.InferenceStub(channel)
        streams = [asyncio.create_task(streams_until(over, stub, pb, number, begun)) for number in range(STREAMS)]
        try:
            for _ in range(STREAMS):
                await asyncio.wait_for(begun.acquire(), PATIENCE)
            for number in range(REPLICAS):
                # One that has failed is told at once.
                assert not any(task.done() for task in streams), [task.exception() for task in streams if task.done()]
                status = await replicas[number].end()
                assert status == 0, (number, status)
                replicas[number] = replica(number)
                await replicas[number].is_ready()
            over.set()
            await asyncio.gather(*streams)
        finally:
            for task in streams:
                task.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    assert await router.end() == 0


def test_no_stream_fails_while_every_replica_is_replaced(tmp_path):
    with contextlib.ExitStack() as started:
        asyncio.run(roll(tmp_path, started))
