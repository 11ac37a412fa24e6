"""What is left of a server whose engine fails or hangs: callers go elsewhere, the process ends."""

from __future__ import annotations

import concurrent.futures

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mora_serve import errors
from mora_serve.client import connection
from mora_serve.server.ending import ENGINE_FAILED
from mora_serve.v1 import server_pb2, server_pb2_grpc
from tests.server.conftest import OUTLASTING, running, wait_for
from tests.server.process import NOT_SERVING, health, server_process

LONG = {"base": True, **OUTLASTING}


def break_steps(serving) -> None:
    """From now on the engine's next step raises, outside of any request."""
    serving.server._assembly.engine.scheduler.schedule = lambda now, spent=0: 1 / 0


def refused(serving) -> errors.MoraError:
    """What a call without a retry policy gets."""
    request = server_pb2.GetServerInfoRequest()
    with (
        grpc.insecure_channel(serving.server.address) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(request, timeout=30)
    return connection.error_of(caught.value, "")


def test_every_caller_is_sent_elsewhere(configure):
    """Streams in their middle, whole answers, those who wait in line, and new calls."""
    config = configure(engine={"max_batch": 2})
    with running(config) as serving, serving.client() as client:
        streams = [client.stream("hello", **LONG) for _ in range(4)]
        received = [iter(s) for s in streams[:2]]
        for one in received:
            next(one)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            whole = threads.submit(client.generate, "hello", **LONG)
            wait_for(lambda: serving.server._assembly.engine.stats().waiting == 3)
            break_steps(serving)
            for stream in [*received, *streams[2:]]:
                with pytest.raises(errors.Unavailable) as caught:
                    list(stream)
                assert caught.value.reason == "ENGINE_FAILED"
            with pytest.raises(errors.Unavailable):
                whole.result(60)
        assert health(client) == NOT_SERVING
        error = refused(serving)
        assert (error.code, error.reason) == ("UNAVAILABLE", "ENGINE_FAILED")
        assert error.retry_after is None  # not from this one


def test_whoever_watches_the_health_is_told(configure):
    with running(configure()) as serving, serving.client() as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        watching = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        break_steps(serving)
        with pytest.raises(errors.Unavailable):
            client.generate("hello", timeout=10, **LONG)
        assert next(watching).status == NOT_SERVING
        watching.cancel()


def test_one_that_fails_during_the_start_ends_the_process(root):
    with server_process(root, "dies-early") as (process, _):
        assert process.wait(120) == ENGINE_FAILED
    assert "the engine has failed" in process.stderr.read().decode()


@pytest.mark.parametrize(
    ("fault", "flags", "logged"),
    [
        ("raises", {}, "ZeroDivisionError"),
        ("hangs", {"engine.step_seconds": 2}, "stand_still"),
    ],
)
def test_the_process_ends_with_a_status_of_its_own(root, fault, flags, logged):
    """Also where the engine's thread stands still; the log says where."""
    with server_process(root, fault, **flags) as (process, client):
        client.wait_until_ready(60)
        with pytest.raises(errors.Unavailable) as caught:
            list(client.stream("hello", **LONG))
        # The client tries again, and may find nobody there any more.
        assert caught.value.reason in ("ENGINE_FAILED", "UNAVAILABLE")
        assert process.wait(60) == ENGINE_FAILED
    log = process.stderr.read().decode()
    assert logged in log
    assert "the engine has failed" in log
