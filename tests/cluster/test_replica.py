"""A replica of the demo, without Ray: what a gateway gets of it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio

from mora_serve.adapters.record import AdapterRecord
from mora_serve.adapters.registry import Registry
from mora_serve.cluster.replica import INTERNAL, Replica
from mora_serve.cluster.wire import OTHER_BASE, Pooling
from mora_serve.config import AdaptersConfig, Config, EngineConfig, ServerConfig
from mora_serve.core import AdapterWeight, Event, Finish, Mixture, Request, SamplingParams
from mora_serve.demo.bundle import register_bundle
from mora_serve.errors import Failure
from mora_serve.model.loading import read_base

pytestmark = pytest.mark.asyncio(loop_scope="module")
FAILED = threading.Event()


async def answered(replica: Replica, request: Request) -> list[Event | Failure | None]:
    base = replica.describe().fingerprint
    return [item async for item in replica.generate(request, None, base)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[AdapterRecord, ...]]:
    state, base = tmp_path_factory.mktemp("state"), read_base("demo")
    with Registry(state, AdaptersConfig(), base.shape, base.fingerprint) as registry:
        register_bundle(registry, base.shape, AdaptersConfig(), "default")
        return state, registry.all()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replica(records: tuple[Path, tuple[AdapterRecord, ...]]) -> AsyncIterator[Replica]:
    state, adapters = records
    config = Config(
        server=ServerConfig(state=str(state)),
        engine=EngineConfig(threads=1, kv_bytes=64 << 20),
    )
    gone = "0" * 64
    made = Replica(
        config, lambda count, seconds: [gone, *(a.digest for a in adapters[:3])], FAILED.set
    )
    yield made
    made.close()


def asked(adapter: AdapterRecord | None = None, **sampling: object) -> Request:
    weights = () if adapter is None else (AdapterWeight(adapter.name, 1.0, adapter.digest),)
    return Request("r", (5, 6, 7), SamplingParams(ignore_eos=True, **sampling), Mixture(weights))


async def test_it_is_warm_with_what_others_use_most(replica: Replica, records):
    _, adapters = records
    assert {a.digest for a in adapters[:3]} <= set(replica.record_routing_stats()["resident"])


async def test_a_request_is_admitted_and_then_answered(replica: Replica, records):
    _, adapters = records
    before = replica.record_routing_stats()["misses"]
    items = await answered(replica, asked(adapters[5], max_tokens=60))
    assert items[0] is None
    events = [item for item in items if isinstance(item, Event)]
    assert len(events) == len(items) - 1
    assert sum(len(e.tokens) for e in events) == 60
    assert events[-1].finish is Finish.LENGTH
    assert replica.hottest(1) == [adapters[5].digest]
    assert replica.record_routing_stats()["misses"] > before


def set_cluster(replica: Replica, monkeypatch: pytest.MonkeyPatch, **values: float) -> None:
    cluster = dataclasses.replace(replica._config.cluster, **values)
    monkeypatch.setattr(replica, "_config", dataclasses.replace(replica._config, cluster=cluster))


async def test_later_tokens_are_gathered(replica: Replica, monkeypatch: pytest.MonkeyPatch):
    """For longer, the more streams there are."""
    set_cluster(replica, monkeypatch, messages=100.0, flush_seconds=0.25)
    base = replica.describe().fingerprint
    stream = replica.generate(asked(max_tokens=200), None, base)
    pauses = {replica._pause async for _ in stream}
    assert pauses == {0.01}
    monkeypatch.setattr(replica, "_streams", 1000)
    items = await answered(replica, asked(max_tokens=200))
    assert len(items) < 100
    assert replica._pause == 0.25


async def test_an_answers_end_waits_for_nothing(replica: Replica, monkeypatch: pytest.MonkeyPatch):
    set_cluster(replica, monkeypatch, messages=1e-9, flush_seconds=1e6)
    items = await answered(replica, asked(max_tokens=200))
    assert items[-1].finish is Finish.LENGTH
    assert len(items) <= 4  # the place, the first token, what came with it, the rest


async def test_a_refusal_is_a_failure_with_its_fields(replica: Replica):
    long = Request("r", tuple([5] * 4000), SamplingParams(max_tokens=4))
    [failure] = await answered(replica, long)
    assert isinstance(failure, Failure)
    assert (failure.code, failure.reason) == ("INVALID_ARGUMENT", "PROMPT_TOO_LONG")


async def test_content_that_is_gone_is_not_found(replica: Replica):
    mixture = Mixture((AdapterWeight("x", 1.0, "0" * 64),))
    [failure] = await answered(replica, Request("r", (5,), mixture=mixture))
    assert isinstance(failure, Failure)
    assert failure.code == "NOT_FOUND"


async def test_a_fault_leaves_as_nothing_but_a_failure(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
):
    def broken(request: Request) -> None:
        raise ValueError("/secret/path")

    monkeypatch.setattr(replica._bridge, "submit", broken)
    assert await answered(replica, asked()) == [INTERNAL]


async def test_whoever_leaves_ends_the_request(replica: Replica):
    async with aclosing(
        replica.generate(asked(max_tokens=400), None, replica.describe().fingerprint)
    ) as items:
        async for item in items:
            if item is not None:
                break
    assert not replica._bridge._open


async def test_its_states_are_those_of_its_engine(replica: Replica):
    base = replica._engine.base
    states = await replica.pool(Pooling(("a text", "another"), 1, 16), base.fingerprint)
    assert states.shape == (2, base.shape.hidden_size)


async def test_what_is_for_another_base_is_refused(replica: Replica):
    assert [item async for item in replica.generate(asked(), None, "f")] == [OTHER_BASE]
    assert await replica.pool(Pooling(("a text",), 1, 16), "f") == OTHER_BASE


async def test_who_leaves_while_contents_are_being_held_leaves_none_held(
    replica: Replica, records, monkeypatch: pytest.MonkeyPatch
):
    registry, (_, adapters) = replica._registry, records
    holding, go, released = threading.Event(), threading.Event(), threading.Event()
    retain, release = registry.retain, registry.release

    def slow(digest: str) -> None:
        holding.set()
        assert go.wait(30)
        retain(digest)

    def told(digest: str) -> None:
        release(digest)
        released.set()

    monkeypatch.setattr(registry, "retain", slow)
    monkeypatch.setattr(registry, "release", told)
    task = asyncio.ensure_future(answered(replica, asked(adapters[0])))
    assert await asyncio.to_thread(holding.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not released.is_set()
    go.set()
    assert await asyncio.to_thread(released.wait, 30)


async def test_whose_engine_is_gone_says_so(replica: Replica, monkeypatch: pytest.MonkeyPatch):
    replica.check_health()

    def broken() -> None:
        raise RuntimeError("outside any request")

    monkeypatch.setattr(replica._engine, "step", broken)
    items = await answered(replica, asked(max_tokens=400))
    last = items[-1]
    failure = last.error if isinstance(last, Event) else last
    assert (failure.code, failure.reason) == ("UNAVAILABLE", "ENGINE_FAILED")
    assert await asyncio.to_thread(FAILED.wait, 30)
    with pytest.raises(RuntimeError):
        replica.check_health()
