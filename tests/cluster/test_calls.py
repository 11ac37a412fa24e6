"""What Ray Serve raises, as the gateway takes it; a handle that raises it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from mora_serve.cluster.wire import Pooling, ReplicaLost
from mora_serve.core import EngineStats, Event, Request
from mora_serve.errors import Failure, ResourceExhausted, Unavailable

pytest.importorskip("ray.serve", reason="Ray is not installed: pip install 'mora-serve[ray]'")

from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from mora_serve.cluster.calls import HandleReplicas  # imports ray

REQUEST, POOLING = Request("r", (1,)), Pooling(("a text",), 1, 8)
GONE = DeploymentUnavailableError(DeploymentID("replica", "mora"))
LOST = (
    ActorDiedError(),
    NodeDiedError("node"),
    OutOfMemoryError("/a/path"),
    RuntimeError("a status of the transport"),
    asyncio.CancelledError(),  # what a call raises that the replica's end cancels
)


class Response:
    """One call's answer: items, then an error if there is any; or never."""

    def __init__(self, items: tuple[Any, ...], error: BaseException | None, hangs: bool) -> None:
        self.items, self.error, self.hangs = items, error, hangs
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    async def __aiter__(self) -> AsyncIterator[Any]:
        for item in self.items:
            yield item
        await self._end()

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        await self._end()
        return self.items[0]

    async def _end(self) -> None:
        if self.hangs:
            await asyncio.sleep(1000)
        if self.error is not None:
            raise self.error

    async def results_async(self, *, return_exceptions: bool) -> list[Any]:
        await self._end()
        return list(self.items)


class Handle:
    """A deployment's handle, each of whose calls ends the same."""

    def __init__(self, *items: Any, error: BaseException | None = None, hangs: bool = False):
        self.response = Response(items, error, hangs)

    def options(self, **options: Any) -> Handle:
        return self

    def remote(self, *args: Any) -> Response:
        return self.response

    def broadcast(self, method: str) -> Response:
        return self.response


async def streamed(handle: Handle) -> list[Any]:
    return [item async for item in HandleReplicas(handle).stream(REQUEST, None, "f")]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
async def test_whatever_ray_raises_is_a_lost_replica(error: BaseException):
    handle = Handle(None, Event("r"), error=error)
    with pytest.raises(ReplicaLost):
        await streamed(handle)
    with pytest.raises(Unavailable) as e:
        await HandleReplicas(handle).pool(POOLING, "f")
    assert e.value.reason == "NO_REPLICA"


async def test_a_full_line_and_no_replica_are_typed():
    full = BackPressureError(num_queued_requests=9, max_queued_requests=9)
    for handle, kind in (
        (Handle(error=full), ResourceExhausted),
        (Handle(error=GONE), Unavailable),
    ):
        for call in (streamed(handle), HandleReplicas(handle).pool(POOLING, "f")):
            with pytest.raises(kind) as e:
                await call
            assert e.value.retry_after


async def test_who_leaves_ends_the_call_in_the_replica():
    for call in (streamed, lambda handle: HandleReplicas(handle).pool(POOLING, "f")):
        handle = Handle(hangs=True)
        task = asyncio.ensure_future(call(handle))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert handle.response.cancelled


async def test_states_come_as_they_are_and_a_failure_as_its_error():
    states = np.ones((1, 4), np.float32)
    assert await HandleReplicas(Handle(states)).pool(POOLING, "f") is states
    failure = Failure("RESOURCE_EXHAUSTED", "QUEUE_FULL", "queue: it is full", retry_after=2.0)
    with pytest.raises(ResourceExhausted):
        await HandleReplicas(Handle(failure)).pool(POOLING, "f")


async def test_reports_are_those_of_the_replicas_that_are_up():
    one, two = ("a", EngineStats(running=1)), ("b", EngineStats(running=2))
    handle = Handle(one, ActorDiedError(), two)
    assert await HandleReplicas(handle).reports() == dict([one, two])
    assert await HandleReplicas(Handle(error=GONE)).reports() == {}
