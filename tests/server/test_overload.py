"""A server with more to do than it can: refusals that say what to do, and health all the while."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import families
from mora_serve import errors
from mora_serve.client import connection
from mora_serve.engine.engine import Engine
from mora_serve.v1 import generation_pb2 as pb
from mora_serve.v1 import generation_pb2_grpc
from tests.server.conftest import Running, configuration, running, wait_for

LINE = 32
LONG = 16_000  # tokens of an answer that outlasts a test


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """It runs one request at a time."""
    root = tmp_path_factory.mktemp("overload")
    families.make_base("llama3", root / "base", max_position_embeddings=LONG + 384)
    limits = {"max_queue": LINE, "max_batch": 1, "max_tokens": LONG}
    with running(configuration(Path(root), engine=limits, adapters={"root": ""})) as serving:
        with serving.client() as client:  # how much of what they may answers make is known then
            client.generate("hello", base=True, max_tokens=8, ignore_eos=True)
        yield serving


def engine(serving: Running) -> Engine:
    assembly = serving.server._assembly
    assert assembly is not None
    return assembly.engine


class Caller:
    """One tenant's calls, none of which is repeated by the client."""

    def __init__(self, serving: Running, tenant: str) -> None:
        options = (("grpc.enable_retries", 0),)
        self._channel = grpc.insecure_channel(serving.server.address, options)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = (("mora-tenant", tenant),)
        self.streams: list[Any] = []

    def stream(self) -> Any:
        """A long answer of the base that is on its way when this returns."""
        call = self._stub.GenerateStream(
            pb.GenerateStreamRequest(**fields()), metadata=self._metadata
        )
        self.streams.append(call)
        next(call)
        return call

    def ask(self, timeout: float = 60.0) -> errors.MoraError:
        """What a call for a long answer fails with; a refusal has its pushback."""
        with pytest.raises(grpc.RpcError) as caught:
            self._stub.Generate(
                pb.GenerateRequest(**fields()), metadata=self._metadata, timeout=timeout
            )
        error = connection.error_of(caught.value, "")
        if error.code == "RESOURCE_EXHAUSTED":
            pushback = dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
            assert error.retry_after
            in_time = error.retry_after < timeout - 2.0
            assert pushback == str(round(1000 * error.retry_after)) or not in_time
            assert pushback == "-1" or error.retry_after < timeout
        return error

    def close(self) -> None:
        for stream in self.streams:
            stream.cancel()
        self._channel.close()


def fields() -> dict[str, Any]:
    return {
        "prompt": pb.Prompt(text="hello"),
        "selection": pb.Selection(base=pb.BaseOnly()),
        "sampling": pb.SamplingParams(max_tokens=LONG, ignore_eos=True),
    }


@pytest.fixture
def flood(server: Running) -> Iterator[Caller]:
    """One request of a tenant runs, and as many of it wait as may."""
    with contextlib.closing(Caller(server, "flood")) as flood:
        first = flood.stream()
        next(first)  # a token: steps have been measured
        for _ in range(LINE // 2):
            flood.stream()
        yield flood
    wait_for(lambda: not engine(server).admission.waiting)


def test_a_tenants_line_is_full_before_the_servers(server: Running, flood: Caller) -> None:
    """The next one is refused and told when to come back, another tenant's is taken in."""
    error = flood.ask()
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "TENANT_QUEUE_FULL")
    assert "retry later" in error.message
    assert "/" not in error.message
    with contextlib.closing(Caller(server, "other")) as other:
        other.stream()


def test_a_deadline_that_cannot_be_met_is_refused_long_before_it(
    server: Running, flood: Caller
) -> None:
    """Fifteen long answers are ahead; a retry would come too late, and the client is told so."""
    flood.streams.pop().cancel()
    wait_for(lambda: engine(server).admission.waiting < LINE // 2)
    error = flood.ask(timeout=10.0)
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DEADLINE_UNREACHABLE")
    assert "the wait is about" in error.message


def test_health_is_answered_throughout_a_flood(server: Running, flood: Caller) -> None:
    """Hundreds of calls come and are refused; each question about health finds it serving."""
    codes: list[str] = []

    def call() -> None:
        codes.extend(flood.ask(timeout=20.0).code for _ in range(100))

    threads = [threading.Thread(target=call) for _ in range(4)]
    checks = 0
    with grpc.insecure_channel(server.server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            checks += 1
    assert checks
    assert codes == ["RESOURCE_EXHAUSTED"] * 400


def test_when_the_flood_has_gone_all_is_free(server: Running, flood: Caller) -> None:
    """Who was refused before is answered, and nothing of the flood is held."""
    assert flood.ask().code == "RESOURCE_EXHAUSTED"
    for stream in flood.streams:
        stream.cancel()
    wait_for(lambda: not engine(server).admission.waiting)
    with server.client("flood") as client:
        answer = client.generate("hello", base=True, max_tokens=4, ignore_eos=True)
        assert len(answer.tokens) == 4
    stats = engine(server).stats
    wait_for(lambda: stats().running == stats().waiting == stats().kv_pages_used == 0)
    assert not engine(server).admission.waiting
