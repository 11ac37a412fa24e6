"""The replicas as one engine; scripted replicas that go away, refuse and fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from benchmarks.tiny import SHAPE
from mora_serve.cluster.remote import (
    ATTEMPTS,
    RemoteBase,
    RemoteEngine,
)
from mora_serve.cluster.wire import OTHER_BASE, Description, Pooling, ReplicaLost
from mora_serve.config import Config
from mora_serve.core import EngineStats, Event, Finish, Request, TokenOut
from mora_serve.errors import Failure, Internal, ResourceExhausted, Unavailable
from mora_serve.metrics import Metrics
from mora_serve.server.bridge import Bridge

REQUEST = Request("r", (1, 2, 3))
FULL = Failure("RESOURCE_EXHAUSTED", "QUEUE_FULL", "queue: it is full", retry_after=2.0)
GOING = Failure("UNAVAILABLE", "DRAINING", "server: it is shutting down")
AWAY = Failure("UNAVAILABLE", "STORE_UNAVAILABLE", "store: it does not answer", retry_after=1.0)

Script = Callable[[], AsyncIterator[Event | Failure | None]]


def piece(text: str, finish: Finish | None = None) -> Event:
    return Event("another id", tuple(TokenOut(ord(c)) for c in text), text, finish)


class Scripted:
    """Replicas that answer by scripts, one a try; the last one stays."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.closed = 0

    async def stream(self, request: Request, left: float | None, fingerprint: str):
        assert fingerprint == "f"
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        try:
            async for item in script():
                yield item
        finally:
            self.closed += 1

    async def pool(self, pooling: Pooling, fingerprint: str):
        return np.zeros((len(pooling.texts), 4), np.float32)

    async def reports(self) -> dict[str, EngineStats]:
        return {"one": EngineStats(running=1, resident=("a",)), "two": EngineStats(running=2)}


SAID = Description("b", "f", "nf4", "bf16", "cpu", 64, 8, "bf16")


def engine(*scripts: Script) -> tuple[RemoteEngine, list[Event], Scripted]:
    replicas = Scripted(*scripts)
    base = RemoteBase("b", SHAPE, None, "f", "nf4", "bf16", "cpu")
    told: list[bool] = []
    made = RemoteEngine(replicas, base, SAID, Config(), asyncio.get_running_loop(), told.append)
    made.told = told
    events: list[Event] = []
    made._deliver = events.extend
    return made, events, replicas


async def ended(made: RemoteEngine) -> None:
    async with asyncio.timeout(30):
        while made._tasks:
            await asyncio.sleep(0.01)


async def whole() -> AsyncIterator[Event | None]:
    yield None
    yield piece("ab")
    yield piece("cd", Finish.STOP)


async def dies() -> AsyncIterator[Event | None]:
    yield None
    yield piece("abc")
    raise ReplicaLost


async def goes() -> AsyncIterator[Failure]:
    yield GOING


async def test_events_come_under_the_requests_own_id():
    made, events, _ = engine(whole)
    await made.submit(REQUEST)
    await ended(made)
    assert [(e.request_id, e.text) for e in events] == [("r", "ab"), ("r", "cd")]


async def moved() -> AsyncIterator[Failure]:
    yield OTHER_BASE


async def storeless() -> AsyncIterator[Failure]:
    yield AWAY


@pytest.mark.parametrize("first", [dies, goes, moved, storeless])
async def test_a_lost_replica_is_not_noticed(first: Script):
    made, events, _ = engine(first, whole)
    await made.submit(REQUEST)
    await ended(made)
    assert "".join(e.text for e in events) == "abcd"
    assert events[-1].finish is Finish.STOP
    assert made.lost == 1


async def test_after_several_lost_replicas_the_error_may_be_retried():
    made, events, replicas = engine(dies)
    await made.submit(REQUEST)
    await ended(made)
    error = events[-1].error
    assert (error.code, error.reason) == ("UNAVAILABLE", "REPLICA_LOST")
    assert error.retry_after
    assert replicas.closed == ATTEMPTS


async def full() -> AsyncIterator[Failure]:
    yield FULL


async def test_a_refusal_is_raised_ahead_of_the_answer():
    made, _, _ = engine(full)
    with pytest.raises(ResourceExhausted) as e:
        await made.submit(REQUEST)
    assert (e.value.reason, e.value.retry_after) == ("QUEUE_FULL", 2.0)


async def test_a_refusal_is_not_counted_as_an_answer_that_ended():
    made, _, _ = engine(full)
    metrics = Metrics("0")
    bridge = Bridge(made, metrics, asyncio.get_running_loop())
    made._deliver = bridge.deliver
    with pytest.raises(ResourceExhausted):
        async with bridge.submit(REQUEST) as generation:
            await generation.admitted()
    await ended(made)
    await asyncio.sleep(0)
    counts = [
        sample.value
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "mora_request_success_total"
    ]
    assert counts
    assert not any(counts)


async def test_what_no_replica_can_help_is_said_as_it_is():
    made, events, replicas = engine(storeless)
    with pytest.raises(Unavailable) as e:
        await made.submit(REQUEST)
    assert (e.value.reason, e.value.retry_after) == ("STORE_UNAVAILABLE", 1.0)
    assert replicas.closed == ATTEMPTS
    assert not events  # it never ran


async def test_a_fault_says_nothing_of_its_inside(caplog: pytest.LogCaptureFixture):
    async def broken() -> AsyncIterator[Event]:
        raise ValueError("/secret/path")
        yield

    made, _, _ = engine(broken)
    with pytest.raises(Internal) as e:
        await made.submit(REQUEST)
    assert "secret" not in e.value.message


async def test_an_abort_reaches_the_replica_and_gives_the_place_back():
    async def endless() -> AsyncIterator[Event | None]:
        yield None
        await asyncio.sleep(1000)

    made, _, replicas = engine(endless)
    await made.submit(REQUEST)
    made.abort("r")
    await ended(made)
    assert replicas.closed == 1
    assert made._places.held == 0


async def test_an_answer_that_differs_is_not_patched_on():
    async def other() -> AsyncIterator[Event | None]:
        yield None
        yield piece("abX", Finish.STOP)

    made, events, _ = engine(dies, other)
    await made.submit(REQUEST)
    await ended(made)
    assert "".join(e.text for e in events) == "abc"
    assert events[-1].error.reason == "REPLICA_LOST"


async def test_without_replicas_calls_are_refused_for_now():
    made, _, replicas = engine(whole)
    made.check_line("t", 1, 1, None)

    async def none() -> dict[str, EngineStats]:
        return {}

    replicas.reports = none
    made.start(lambda events: None)
    async with asyncio.timeout(30):
        while made._serving:
            await asyncio.sleep(0.01)
    with pytest.raises(Unavailable) as e:
        made.check_line("t", 1, 1, None)
    assert e.value.retry_after
    assert made.told == [False]
    made._cancel()


async def test_states_come_from_a_replica():
    made, _, _ = engine(whole)
    states = await asyncio.wrap_future(made.pooled_hidden(["a", "b"], 1, 8))
    assert states.shape == (2, 4)


def test_pins_leave_slots_for_mixtures():
    async def pinned() -> None:
        made, _, _ = engine(whole)
        for i in range(8 - Config().adapters.max_mixture):
            made.pin(f"d{i}")
        made.pin("d0")
        with pytest.raises(ResourceExhausted):
            made.pin("one more")
        made.unpin("d0")
        made.pin("one more")

    asyncio.run(pinned())
