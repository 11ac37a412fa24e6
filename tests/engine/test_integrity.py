"""The engine's books: each kind of contradiction is found, and nothing runs on it."""

from __future__ import annotations

import threading
import time

import pytest

from mora_serve.core import Event, Finish, SamplingParams
from mora_serve.engine import integrity
from mora_serve.engine.kv_cache import IntegrityError
from tests.engine.test_engine import GREEDY, PROMPT, drive, ids

LONG = SamplingParams(200, ignore_eos=True)


def books(local):
    engine = local.engine
    return list(engine._sequences.values()), engine.cache, engine.scheduler, engine.pool


@pytest.fixture
def busy(make_engine):
    """An engine with a request that runs on an adapter, one that waits, and some cached pages."""
    local = make_engine(max_batch=1, check=False)
    drive(local, [local.request((PROMPT * 2, {}, GREEDY))])
    for mixture in ({"rank-8": 1.0}, {"rank-4": 1.0}):
        local.engine.submit(local.request((PROMPT, mixture, LONG)))
    while not any(isinstance(e, Event) for e in local.step()):
        pass
    integrity.check(*books(local))
    return local


def doubled_page(engine, running, waiting):
    engine.cache._free.append(running.pages[0])


def lost_page(engine, running, waiting):
    engine.cache._free.pop()


def shared_page(engine, running, waiting):
    running.pages[-1] = next(iter(engine.cache._evictable))


def leaked_page(engine, running, waiting):
    engine.cache._refs[running.pages[0]] += 1


def miscounted_pages(engine, running, waiting):
    engine.cache._used += 1


def findable_free_page(engine, running, waiting):
    page = engine.cache._free[0]
    engine.cache._page_of[b"hash"], engine.cache._hash_of[page] = page, b"hash"


def pages_of_one_that_waits(engine, running, waiting):
    engine.cache.extend(waiting.pages, 1)


def listed_twice(engine, running, waiting):
    engine.scheduler._queue.push(running)


def listed_nowhere(engine, running, waiting):
    engine.scheduler._queue.remove(waiting)


def unknown_to_the_engine(engine, running, waiting):
    del engine._sequences[waiting.request.id]


def leaked_slot(engine, running, waiting):
    engine.pool._entries[running.digests[0]].references += 1


def dropped_slot(engine, running, waiting):
    engine.pool.drop(running.digests)


def doubled_slot(engine, running, waiting):
    engine.pool._free.append(engine.pool.slot(running.digests[0]))


def evicted_while_in_use(engine, running, waiting):
    entry = engine.pool._entries.pop(running.digests[0])
    engine.pool._free.append(entry.slot)


def load_that_nobody_does(engine, running, waiting):
    engine.pool._loads += 1


def miscounted_users(engine, running, waiting):
    engine.scheduler._held["default"][running.digests[0]] += 1


def too_many_pins(engine, running, waiting):
    engine.pool._pinned |= {f"digest-{i}" for i in range(6)}


CONTRADICTIONS = [
    *(doubled_page, lost_page, shared_page, leaked_page, miscounted_pages, findable_free_page),
    *(pages_of_one_that_waits, listed_twice, listed_nowhere, unknown_to_the_engine),
    *(leaked_slot, dropped_slot, doubled_slot, evicted_while_in_use, load_that_nobody_does),
    *(miscounted_users, too_many_pins),
]


@pytest.mark.parametrize("spoil", CONTRADICTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("make_engine", ["torch"], indirect=True)
def test_every_contradiction_is_found(busy, spoil):
    (running,), (waiting,) = busy.engine.scheduler.running, busy.engine.scheduler.waiting
    spoil(busy.engine, running, waiting)
    with pytest.raises(IntegrityError):
        integrity.check(*books(busy))


class Served:
    """An engine on its thread; ``answer`` waits for a request's end."""

    def __init__(self, local) -> None:
        self.local = local
        self.failed = threading.Event()
        self.seen: list[Event] = []
        self._more = threading.Condition()
        local.engine.start(self._deliver, self.failed.set)

    def _deliver(self, events) -> None:
        with self._more:
            self.seen += [e for e in events if isinstance(e, Event)]
            self._more.notify_all()

    def wait(self, condition, seconds: float = 60.0) -> None:
        with self._more:
            assert self._more.wait_for(condition, seconds)

    def answer(self, request) -> list[Event]:
        self.local.engine.submit(request)
        own = lambda: [e for e in self.seen if e.request_id == request.id]  # noqa: E731
        self.wait(lambda: own() and own()[-1].finish)
        return own()


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(integrity, "IDLE_SECONDS", 0.05)


def test_an_idle_engine_looks_at_its_books_once_after_work(make_engine, quick):
    local = make_engine()
    served = Served(local)
    assert local.engine.stats().integrity_checks == 0
    served.answer(local.request((PROMPT, {"rank-8": 1.0}, GREEDY)))
    until(lambda: local.engine.stats().integrity_checks == 1)
    local.engine.pin(local.digests["rank-4"])  # wakes it up
    until(lambda: local.digests["rank-4"] in local.engine.stats().resident)
    assert local.engine.stats().integrity_checks == 1
    served.answer(local.request((PROMPT, {}, GREEDY)))
    until(lambda: local.engine.stats().integrity_checks == 2)
    assert local.engine.stats().integrity_violations == 0


def test_an_idle_engine_begins_broken_books_anew(make_engine, quick, caplog):
    """It is counted and logged, nothing cached is found again, and requests are answered."""
    local = make_engine()
    prompt = PROMPT * 3
    (want,) = drive(local, [local.request((prompt, {"rank-8": 1.0}, GREEDY))])
    engine = local.engine
    leaked_page(engine, type("", (), {"pages": [next(iter(engine.cache._evictable))]}), None)
    engine.pool._entries[local.digests["rank-8"]].references += 1
    engine.integrity.change()
    served = Served(local)
    until(lambda: engine.stats().integrity_violations == 1)
    assert "begun anew" in caplog.text
    answer = served.answer(local.request((prompt, {"rank-8": 1.0}, GREEDY)))
    assert answer[-1].usage.cached_tokens == 0
    assert ids(answer) == ids(want)
    until(lambda: engine.stats().integrity_checks == 2)
    assert engine.stats().integrity_violations == 1
    assert not served.failed.is_set()


def test_books_that_break_while_requests_run_end_the_engine(make_engine, monkeypatch):
    """No token is computed on pages of which nobody knows whose they are."""
    local = make_engine(check=False)
    served = Served(local)
    local.engine.submit(local.request((PROMPT, {}, SamplingParams(230, ignore_eos=True))))
    served.wait(lambda: served.seen)
    steps = local.engine.scheduler.schedule

    def spoiled(now, spent=0):
        batch = steps(now, spent)
        if not local.engine.integrity.violations:
            local.engine.cache._free.append(batch[0].sequence.pages[0])
            monkeypatch.setattr(integrity, "BUSY_SECONDS", 0.0)
        return batch

    monkeypatch.setattr(local.engine.scheduler, "schedule", spoiled)
    assert served.failed.wait(60)
    last = served.seen[-1]
    assert last.finish is Finish.ERROR
    assert (last.error.code, last.error.reason) == ("UNAVAILABLE", "ENGINE_FAILED")
    assert local.engine.stats().integrity_violations == 1


def test_books_that_stay_wrong_end_an_idle_engine(make_engine, quick):
    """A slot that is lost is none that can be begun anew."""
    local = make_engine(check=False)
    local.engine.pool._free.pop()
    local.engine.integrity.change()
    served = Served(local)
    assert served.failed.wait(60)
