"""A server's life: loading, serving, draining; health, reflection, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import urllib.request
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from prometheus_client.parser import text_string_to_metric_families

from mora_serve import errors
from mora_serve.client import connection
from mora_serve.server.app import MoraServer
from mora_serve.server.services import SERVICES
from mora_serve.v1 import generation_pb2, generation_pb2_grpc, server_pb2, server_pb2_grpc
from tests.server.conftest import CONTEXT, LONGEST, OUTLASTING, running, wait_for
from tests.server.process import NOT_SERVING, SERVING, health, server_process

LONG = {"base": True, **OUTLASTING}


def impatient(serving) -> grpc.Channel:
    """A channel without a retry policy."""
    return grpc.insecure_channel(serving.server.address)


def scrape(serving) -> dict[str, float]:
    """Samples by name, those with labels as name{value,...}."""
    url = f"http://127.0.0.1:{serving.server.metrics_port}/metrics"
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    return {
        s.name + ("{" + ",".join(s.labels.values()) + "}" if s.labels else ""): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_health_is_serving_for_the_server_and_each_service(client):
    for service in ("", *SERVICES):
        assert health(client, service) == SERVING
    client.wait_until_ready(timeout=5)


def test_reflection_knows_every_service(client):
    database = ProtoReflectionDescriptorDatabase(client.channel)
    assert set(SERVICES) <= set(database.get_services())
    assert database.FindFileContainingSymbol("mora_serve.v1.GenerationService").package


def test_the_server_describes_itself(client, serving):
    info = client.server_info()
    assert info.version
    assert (info.base.name, info.base.architecture) == ("base", "llama")
    assert (info.base.quantization, info.base.dtype, info.base.device) == ("none", "fp32", "cpu")
    assert (info.base.vocab_size, info.base.chat) == (320, True)
    assert len(info.base.fingerprint) >= 16
    assert info.adapter_dtype == "fp32"
    limits = info.limits
    assert (limits.max_context, limits.max_tokens, limits.slots) == (CONTEXT, LONGEST, 8)
    assert info.adapters == 0
    client.register_adapter("rev", "rev")
    assert client.server_info().adapters == 1


def test_metrics_follow_what_happens(client, serving):
    client.register_adapter("metered", "rev")
    before = scrape(serving)
    client.generate("hello", adapters={"metered": 1.0}, max_tokens=5, ignore_eos=True)
    with pytest.raises(errors.NotFound):
        client.generate("hello", adapters={"unknown": 1.0})
    after = scrape(serving)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("mora_generation_tokens_total") == 5
    assert grown("mora_request_success_total{length}") == 1
    assert grown("mora_inter_token_latency_seconds_count") == 4
    assert grown("mora_e2e_request_latency_seconds_count") == 1
    assert grown("mora_router_decisions_total{explicit}") == 1
    assert grown("mora_adapter_request_latency_seconds_count{metered}") == 1
    generate = "mora_grpc_requests_total{%s,/mora_serve.v1.GenerationService/Generate}"
    assert (grown(generate % "OK"), grown(generate % "NOT_FOUND")) == (1, 1)
    assert after["mora_adapter_resident{metered}"] >= 1
    assert not any("unknown" in name for name in after)
    client.unregister_adapter("metered")
    assert not any("metered" in name for name in scrape(serving))


def test_the_event_loop_is_watched_from_the_start(serving):
    """Its timers are counted, and a callback that holds it up shows in the histogram."""
    name = "mora_event_loop_lag_seconds_count"
    late = "mora_event_loop_lag_seconds_bucket{%s}"
    before = scrape(serving)
    serving.loop.call_soon_threadsafe(time.sleep, 0.3)
    wait_for(lambda: scrape(serving)[name] >= before[name] + 5)
    after = scrape(serving)
    slow = after[name] - after[late % "0.1"]
    assert slow > before[name] - before[late % "0.1"]


def test_cancelled_and_late_requests_are_counted(client, serving):
    """A late one is the server's to count, unless the client's own clock gives up first: then it
    is one that was cancelled, or has not even arrived."""
    before = scrape(serving)

    def grown(reason: str) -> float:
        name = f"mora_request_success_total{{{reason}}}"
        return scrape(serving)[name] - before[name]

    client.stream("hello", **LONG).cancel()
    wait_for(lambda: grown("cancelled") == 1)
    for _ in range(10):
        with pytest.raises(errors.DeadlineExceeded):
            client.generate("hello", timeout=0.05, **LONG)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: grown("deadline") == 1, 2.0)
            break
    assert grown("deadline") == 1


@pytest.fixture
def full(configure):
    """A server that runs one request, with one waiting, which is all it takes."""
    config = configure(engine={"max_queue": 1, "max_batch": 1})
    with running(config) as serving, serving.client() as client:
        streams = [client.stream("hello", **LONG)]
        next(iter(streams[0]))
        streams.append(client.stream("hello", **LONG))
        yield serving, streams
        for stream in streams:
            stream.cancel()


def test_a_full_queue_says_when_to_come_back(full):
    with impatient(full[0]) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        prompt = generation_pb2.Prompt(text="x")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(generation_pb2.GenerateRequest(prompt=prompt), timeout=3600)
    error = connection.error_of(caught.value, "")
    assert isinstance(error, errors.ResourceExhausted)
    assert error.reason == "QUEUE_FULL"
    pushback = dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
    assert int(pushback) == round(1000 * error.retry_after) > 0


def test_clients_come_back_when_told(full):
    """The retry policy waits as the server says, and is then served."""
    serving, streams = full

    def refused() -> bool:
        return any("RESOURCE_EXHAUSTED" in name and n > 0 for name, n in scrape(serving).items())

    with serving.client() as client, futures.ThreadPoolExecutor() as threads:
        answer = threads.submit(client.generate, "x", base=True, max_tokens=1, timeout=600)
        wait_for(refused)
        for stream in streams:
            stream.cancel()
        assert answer.result(600).usage.completion_tokens == 1


class TestStopping:
    def test_running_requests_finish_and_new_ones_go_elsewhere(self, configure):
        with running(configure()) as serving, serving.client() as client:
            whole = client.generate("hello", **LONG).text
            stream = client.stream("hello", **LONG)
            received = iter(stream)
            text = next(received).text
            stopping = asyncio.run_coroutine_threadsafe(serving.server.stop(), serving.loop)
            wait_for(lambda: health(client) == NOT_SERVING)
            with impatient(serving) as channel, pytest.raises(grpc.RpcError) as caught:
                server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(
                    server_pb2.GetServerInfoRequest(), timeout=10
                )
            assert connection.error_of(caught.value, "").reason == "DRAINING"
            text += "".join(d.text for d in received)
            assert text == whole
            stopping.result(20)

    def test_calls_are_taken_for_a_moment_after_the_health_has_said_no(self, configure):
        """Those that were sent before their clients could know."""
        config = configure(server={"drain_wait_seconds": 2.0})
        with running(config) as serving, serving.client() as client:
            client.generate("hello", base=True, max_tokens=1)
            stopping = asyncio.run_coroutine_threadsafe(serving.server.stop(), serving.loop)
            wait_for(lambda: health(client) == NOT_SERVING)
            assert client.generate("hello", base=True, max_tokens=1, timeout=20).tokens
            stopping.result(60)

    def test_what_does_not_end_in_time_is_ended(self, configure):
        """Its client learns why."""
        config = configure(server={"drain_seconds": 0.05})
        with running(config) as serving, serving.client() as client:
            streams = [client.stream(f"hello {i}", **LONG) for i in range(8)]
            serving.end()
            for stream in streams:
                with pytest.raises(errors.Unavailable, match="shutting down"):
                    list(stream)

    def test_a_server_can_be_started_again(self, configure):
        for _ in range(2):
            with running(configure()) as serving, serving.client() as client:
                client.generate("hello", base=True, max_tokens=1)


@pytest.fixture
def pipe(tmp_path):
    """A router file that a server goes on loading until something is written."""
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


class TestStarting:
    def test_a_port_in_use_is_explained(self, configure, serving):
        config = configure(server={"port": serving.server.port})
        with pytest.raises(errors.ConfigError, match=r"server\.port"), running(config):
            pass

    def test_a_metrics_port_in_use_is_explained(self, configure, serving):
        config = configure(server={"metrics_port": serving.server.metrics_port})
        with pytest.raises(errors.ConfigError, match=r"server\.metrics_port"), running(config):
            pass

    def test_a_host_that_is_no_address_is_explained(self, configure):
        config = configure(server={"host": "nonsense.invalid"})
        with pytest.raises(errors.ConfigError, match=r"server\.host"), running(config):
            pass

    def test_a_state_that_is_no_directory_is_explained(self, configure, tmp_path):
        (tmp_path / "file").touch()
        config = configure(server={"state": str(tmp_path / "file")})
        with pytest.raises(errors.ConfigError, match=r"server\.state") as e, running(config):
            pass
        assert str(tmp_path) not in e.value.message

    def test_limits_too_small_for_the_bundle_are_explained(self, configure):
        config = configure(
            base={"model": "demo", "quantization": "nf4"}, adapters={"max_adapters": 3}
        )
        message = "bundled adapters do not fit"
        with pytest.raises(errors.ConfigError, match=message), running(config):
            pass

    def test_no_metrics_port_on_request(self, configure):
        with running(configure(server={"metrics_port": -1})) as serving:
            assert serving.server.metrics_port == -1

    def test_a_base_that_cannot_be_loaded_is_explained(self, configure, tmp_path):
        config = configure(base={"model": str(tmp_path)})
        with pytest.raises(errors.ConfigError, match=r"base\.model"), running(config):
            pass

    def test_a_router_that_cannot_be_read_is_explained(self, configure, tmp_path):
        config = configure(router={"path": str(tmp_path / "none")})
        with pytest.raises(errors.ConfigError, match=r"router\.path"), running(config):
            pass

    async def test_while_it_loads_it_says_so(self, configure, pipe):
        """The port answers: health is NOT_SERVING, calls are to come back later."""
        server = MoraServer(configure(router={"path": str(pipe)}))
        starting = asyncio.ensure_future(server.start())
        while not server.port:
            await asyncio.sleep(0.01)
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            check = stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            assert (await check).status == NOT_SERVING
            call = channel.unary_unary("/mora_serve.v1.ServerService/GetServerInfo")
            with pytest.raises(grpc.aio.AioRpcError, match="still loading") as caught:
                await call(b"")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await asyncio.to_thread(pipe.write_bytes, b"no router")
        with pytest.raises(errors.ConfigError, match=r"router\.path"):
            await starting
        await server.stop(0)


class TestProcess:
    """``mora-serve serve`` in a process of its own, as an operator runs it."""

    def test_a_signal_drains_and_the_status_is_zero(self, root):
        with server_process(root) as (process, client):
            client.wait_until_ready(60)
            stream = client.stream("hello", **LONG)
            received = iter(stream)
            next(received)
            process.send_signal(signal.SIGTERM)
            assert sum(1 for _ in received) > 10
            assert process.wait(20) == 0
        log = process.stderr.read().decode()
        assert "loading base" in log
        assert "draining" in log
        assert "Traceback" not in log

    def test_a_second_signal_ends_the_process_at_once(self, root):
        with server_process(root) as (process, client):
            client.wait_until_ready(60)
            stream = client.stream("hello", **LONG)
            next(iter(stream))
            both = (signal.SIGTERM, signal.SIGINT)  # either may arrive first
            for number in both:
                process.send_signal(number)
            assert process.wait(20) in {128 + number for number in both}
        log = process.stderr.read().decode()
        assert "Traceback" not in log
        assert "failed" not in log

    def test_a_signal_while_loading_ends_at_once(self, root, pipe):
        with server_process(root, **{"router.path": pipe}) as (process, client):
            wait_for(lambda: health(client) == NOT_SERVING)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        assert "Traceback" not in process.stderr.read().decode()
