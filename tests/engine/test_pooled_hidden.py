"""Hidden states for the router, asked of an engine at work."""

from __future__ import annotations

import threading
import time

import pytest

from mora_serve.core import Event, SamplingParams
from mora_serve.engine.pool_queue import PoolJob
from mora_serve.errors import Internal, ResourceExhausted, Unavailable
from mora_serve.model.pooling import pool_tokens, pooled_hidden

TEXTS = ["reverse the word", "add 3 and 4", "", "x" * 90]
GREEDY = SamplingParams(60, ignore_eos=True)


class Driven:
    """An engine on its own thread; what it delivers is kept."""

    def __init__(self, local) -> None:
        self.local, self.engine = local, local.engine
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self.engine.start(self._deliver)

    def _deliver(self, events) -> None:
        with self._changed:
            self.events += [e for e in events if isinstance(e, Event)]
            self._changed.notify_all()

    def submit(self, mixtures) -> list[str]:
        requests = [self.local.request(([9] * 24, m, GREEDY)) for m in mixtures]
        for request in requests:
            self.engine.submit(request)
        return [r.id for r in requests]

    def tokens(self, request_id: str) -> list:
        return [t for e in self.events if e.request_id == request_id for t in e.tokens]

    def wait(self, condition) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, 60)

    def finished(self, ids) -> bool:
        return {e.request_id for e in self.events if e.finish} >= set(ids)


def test_states_and_answers_are_the_same_as_without_each_other(make_engine):
    """The states bit for bit; mixtures and the base run beside them."""
    mixtures = [{}, {"rank-8": 1.0}, {"dora": 1.0, "rslora": -0.5}]
    base = make_engine().base
    alone = [pooled_hidden(base.decoder, base.tokenizer, [t], 1, 64)[0] for t in TEXTS]
    quiet = Driven(make_engine())
    ids = quiet.submit(mixtures)
    quiet.wait(lambda: quiet.finished(ids))
    busy = Driven(make_engine())
    others = busy.submit(mixtures)
    busy.wait(lambda: busy.events)
    asked = [busy.engine.pooled_hidden(TEXTS, 1, 64, background=b) for b in (False, True)]
    found = [future.result(60) for future in asked]
    assert not busy.finished(others)
    busy.wait(lambda: busy.finished(others))
    for states in found:
        assert [s.tobytes() for s in states] == [s.tobytes() for s in alone]
    for one, other in zip(ids, others, strict=True):
        assert [t.id for t in quiet.tokens(one)] == [t.id for t in busy.tokens(other)]


def test_an_idle_engine_answers_at_once_and_counts(make_engine):
    driven = Driven(make_engine())
    for _ in range(2):
        assert driven.engine.pooled_hidden(["abc"], 2, 64).result(60).shape == (1, 128)
    assert driven.engine.pooled_hidden([], 2, 64).result(60).shape == (0, 128)
    driven.submit([{}])
    driven.wait(lambda: driven.events)
    assert driven.engine.stats().pooled_tokens == 6


def test_before_its_start_the_caller_computes(make_engine):
    local = make_engine()
    done = local.engine.pooled_hidden(TEXTS, 2, 64)
    assert done.done()
    assert done.result().shape == (4, 128)


def test_before_its_start_callers_take_turns_and_the_start_waits(make_engine, monkeypatch):
    """The queue is for one thread; a router's keys may be made by one while it starts."""
    engine = make_engine().engine
    run, inside, most, begun = engine.pool_queue.run, [], [], threading.Event()

    def watched(busy: bool) -> int:
        inside.append(threading.current_thread().name)
        most.append(len(inside))
        begun.set()
        time.sleep(0.05)
        try:
            return run(busy)
        finally:
            inside.pop()

    monkeypatch.setattr(engine.pool_queue, "run", watched)
    found: dict[int, bytes] = {}

    def ask(i: int) -> None:
        found[i] = engine.pooled_hidden(TEXTS[i:], 2, 64).result(60).tobytes()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(60)
    engine.start(lambda events: None)
    for thread in threads:
        thread.join(60)
    assert max(most) == 1
    for i in range(3):
        assert engine.pooled_hidden(TEXTS[i:], 2, 64).result(60).tobytes() == found[i]


def test_only_the_ends_of_a_long_text_count(make_engine):
    engine = make_engine().engine
    text = "reverse " + "and so on " * 500 + "as json!"
    long, short = (engine.pooled_hidden([t], 2, 16).result() for t in (text, text[:8] + text[-8:]))
    assert long.tobytes() == short.tobytes()


def test_whoever_waits_when_it_stops_is_told(make_engine):
    local = make_engine()
    engine = local.engine
    engine.start(lambda events: None)
    running = [engine.pooled_hidden(["some words"] * 2000, 2, 64, background=True)]
    running.append(engine.pooled_hidden(["a"] * 2000, 2, 64))
    engine.stop()
    for future in running:
        with pytest.raises(Unavailable):
            future.result(60)
    with pytest.raises(Unavailable):
        engine.pooled_hidden(["a"], 2, 64)


def test_whoever_waits_when_it_fails_is_told(make_engine, monkeypatch):
    local = make_engine()
    engine = local.engine
    failed, entered, go_on = threading.Event(), threading.Event(), threading.Event()

    def broken(now, spent):
        entered.set()
        assert go_on.wait(60)
        raise ZeroDivisionError

    monkeypatch.setattr(engine.scheduler, "schedule", broken)
    engine.start(lambda events: None, failed.set)
    begun = engine.pooled_hidden(["some words"] * 2000, 2, 64)
    assert entered.wait(60)
    waiting = engine.pooled_hidden(["a"], 2, 64, background=True)
    go_on.set()
    assert failed.wait(60)
    for future in (begun, waiting):
        with pytest.raises(Unavailable):
            future.result(60)


def test_a_pass_that_breaks_hurts_no_request(make_engine, monkeypatch):
    local = make_engine()
    residual = local.base.decoder.residual

    def broken(*args, depth=None, **kwargs):
        if depth == 1:
            raise ZeroDivisionError
        return residual(*args, **kwargs, depth=depth)

    monkeypatch.setattr(local.base.decoder, "residual", broken)
    driven = Driven(local)
    ids = driven.submit([{}, {"rank-8": 1.0}])
    with pytest.raises(Internal) as e:
        driven.engine.pooled_hidden(["abc"], 1, 64).result(60)
    assert "division" not in e.value.message
    assert driven.engine.pooled_hidden(["abc"], 2, 64).result(60).any()
    driven.wait(lambda: driven.finished(ids))
    assert all(len(driven.tokens(i)) == 60 for i in ids)


def test_a_full_queue_refuses_prompts_to_route_but_no_keys(make_engine, monkeypatch):
    local = make_engine(max_queue=2)
    engine = local.engine
    go_on = threading.Event()
    schedule = engine.scheduler.schedule
    monkeypatch.setattr(engine.scheduler, "schedule", lambda *a: go_on.wait(60) and schedule(*a))
    engine.start(lambda events: None)
    asked = [engine.pooled_hidden(["some words"] * 500, 2, 64) for _ in range(2)]
    with pytest.raises(ResourceExhausted) as e:
        engine.pooled_hidden(["a"], 2, 64)
    assert e.value.reason == "QUEUE_FULL"
    asked.append(engine.pooled_hidden(["a"], 2, 64, background=True))
    go_on.set()
    assert [len(future.result(60)) for future in asked] == [500, 500, 1]


def test_prompts_keep_half_of_a_step(make_engine):
    """However much is pooled, a prompt progresses, and who decodes gets a token."""
    local = make_engine(max_batch=4, step_tokens=8)
    scheduler = local.engine.scheduler
    for request in [local.request(([5] * 20, {}, GREEDY)) for _ in range(2)]:
        local.engine.submit(request)
    local.engine._receive([])
    assert sum(c.length for c in scheduler.schedule(0.0, 0)) == 8
    assert sum(c.length for c in scheduler.schedule(0.0, 3)) == 5
    assert sum(c.length for c in scheduler.schedule(0.0, 100)) == 4


def test_a_text_that_breaks_a_pass_ends_its_own_job(make_engine, monkeypatch):
    """Those in the same pass get their states, as they would have alone."""
    local = make_engine()
    engine, residual = local.engine, local.base.decoder.residual
    want = engine.pooled_hidden(["good"], 2, 64).result(60)
    (bad,) = local.base.tokenizer.encode("§")[:1]

    def broken(tokens, *args, **kwargs):
        if bad in tokens.tolist():
            raise ZeroDivisionError
        return residual(tokens, *args, **kwargs)

    monkeypatch.setattr(local.base.decoder, "residual", broken)
    texts = [["good"], ["§"], ["good"]]
    jobs = [PoolJob([pool_tokens(local.base.tokenizer, t, 64, 320) for t in ts], 2) for ts in texts]
    for job in jobs:
        engine.pool_queue.add(job)
    local.step()
    for job in (jobs[0], jobs[2]):
        assert (job.done.result(0) == want).all()
    with pytest.raises(Internal) as caught:
        jobs[1].done.result(0)
    assert caught.value.reason == "POOLING_FAILED"
