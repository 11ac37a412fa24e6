"""Threads that tenants share: in turn, each in its own order, and as other executors otherwise."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.access.door import Caller
from mora_serve.server import call as calls
from mora_serve.server.services import Threads
from mora_serve.server.turns import TurnExecutor


class Piece:
    """Work that says when it ran."""

    def __init__(self, tenant: str, done: list[Piece]) -> None:
        self.tenant = tenant
        self._done = done

    def __call__(self) -> Piece:
        self._done.append(self)
        return self


@contextmanager
def held(executor: Executor, threads: int = 1) -> Iterator[None]:
    """Its threads are busy inside the context."""
    busy, go_on = threading.Barrier(threads + 1), threading.Event()
    for _ in range(threads):
        executor.submit(lambda: (busy.wait(60), go_on.wait(60)))
    busy.wait(60)
    try:
        yield
    finally:
        go_on.set()


def submitted(
    executor: TurnExecutor, whose: list[str], tenants: str, done: list[Piece]
) -> list[tuple[Piece, Future[Piece]]]:
    pieces = []
    for tenant in tenants:
        whose[0] = tenant
        piece = Piece(tenant, done)
        pieces.append((piece, executor.submit(piece)))
    return pieces


def test_its_threads_are_there_from_the_start() -> None:
    def own() -> int:
        return sum(t.name.startswith("all-of-them") for t in threading.enumerate())

    executor = TurnExecutor(3, "all-of-them")
    assert own() == 3
    executor.shutdown()
    assert own() == 0
    for _ in range(50):  # at whatever point of the beginning
        TurnExecutor(3, "all-of-them").shutdown(cancel_futures=True)
    assert own() == 0


@settings(max_examples=60, deadline=None)
@given(st.text("abcd", max_size=30), st.sets(st.integers(0, 29), max_size=8))
def test_between_two_pieces_of_a_tenant_each_other_waiting_one_gets_one(
    tenants: str, left: set[int]
) -> None:
    """Each tenant's own run in the order in which they came; what is cancelled takes no turn."""
    whose, done = [""], list[Piece]()
    executor = TurnExecutor(1, "turns", lambda: whose[0])
    with held(executor):
        pieces = submitted(executor, whose, tenants, done)
        for i in left & set(range(len(pieces))):
            assert pieces[i][1].cancel()
    executor.shutdown()
    expected = [piece for i, (piece, _) in enumerate(pieces) if i not in left]
    assert [future.result(0) for _, future in pieces if not future.cancelled()] == expected
    assert sorted(map(id, done)) == sorted(map(id, expected))
    for tenant in set(tenants):
        own = [p for p in done if p.tenant == tenant]
        assert own == [p for p in expected if p.tenant == tenant]
        for one, two in itertools.pairwise(own):
            start, end = done.index(one), done.index(two)
            waiting = {p.tenant for p in done[end:]} - {tenant}
            assert waiting <= {p.tenant for p in done[start:end]}
            assert len(set(done[start:end])) == len({p.tenant for p in done[start:end]})


def test_who_comes_late_to_a_long_line_is_next() -> None:
    whose, done = [""], list[Piece]()
    executor = TurnExecutor(1, "turns", lambda: whose[0])
    with held(executor):
        submitted(executor, whose, "a" * 100 + "b", done)
    executor.shutdown()
    assert "b" in [p.tenant for p in done[:2]]


async def test_the_work_is_that_of_the_call_in_progress() -> None:
    """Without being told, as asyncio submits it; outside a call it is nobody's."""
    executor, done, loop = TurnExecutor(1, "turns"), list[Piece](), asyncio.get_running_loop()
    waiting = []

    async def call(tenant: str) -> None:
        calls.enter(calls.Call("r", Caller(tenant=tenant)))
        waiting.extend(loop.run_in_executor(executor, Piece(tenant, done)) for _ in range(3))

    with held(executor):
        for tenant in ("a", "b"):
            await asyncio.create_task(call(tenant))
        waiting.append(loop.run_in_executor(executor, Piece("", done)))
    await asyncio.gather(*waiting)
    executor.shutdown()
    assert [p.tenant for p in done] == ["a", "b", "", "a", "b", "a", "b"]


def test_work_that_brings_its_context_runs_in_it() -> None:
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("ours")
    executor = TurnExecutor(1, "turns")
    run = contextvars.copy_context().run
    futures = [executor.submit(run, variable.get), executor.submit(variable.get)]
    assert [future.result(60) for future in futures] == ["ours", "none"]
    executor.shutdown()


def test_an_error_that_nobody_keeps_is_not_garbage() -> None:
    """The server collects garbage seldom: nothing may wait for it."""
    executor = TurnExecutor(1, "turns")
    gc.disable()
    try:
        future = executor.submit(int, "x")
        assert isinstance(future.exception(60), ValueError)
        left = weakref.ref(future)
        executor.submit(int).result(60)  # the thread is past it
        del future
        assert left() is None
    finally:
        gc.enable()
    executor.shutdown()


def test_errors_go_to_whoever_waits_and_the_threads_go_on() -> None:
    executor = TurnExecutor(1, "turns")
    for error in (ValueError("x"), SystemExit(1)):
        with pytest.raises(type(error)):
            executor.submit(lambda e: (_ for _ in ()).throw(e), error).result(60)
    assert executor.submit(int, "12").result(60) == 12
    executor.shutdown()


def test_a_shutdown_drops_what_waits_and_lets_what_runs_end() -> None:
    executor = TurnExecutor(1, "turns")
    busy, go_on = threading.Event(), threading.Event()
    runs = executor.submit(lambda: (busy.set(), go_on.wait(60))[1])
    waits = executor.submit(int)
    assert busy.wait(60)
    called: list[bool] = []
    waits.add_done_callback(lambda _: called.append(executor._lock.acquire(timeout=60)))
    executor.shutdown(wait=False, cancel_futures=True)
    assert called == [True]  # not with the executor's lock held
    executor._lock.release()
    with pytest.raises(CancelledError):
        waits.result(0)
    go_on.set()
    assert runs.result(60) is True
    with pytest.raises(RuntimeError):
        executor.submit(int)


def test_a_shutdown_that_waits_does_all_that_was_submitted() -> None:
    executor, done = TurnExecutor(2, "turns"), list[Piece]()
    futures = [executor.submit(Piece("", done)) for _ in range(50)]
    executor.shutdown()
    assert len(done) == 50
    assert all(future.done() for future in futures)


@pytest.mark.parametrize("kind", ["tokenize", "route", "registry"])
def test_the_threads_that_callers_share_serve_them_in_turn(kind: str) -> None:
    """Long prompts, decisions and look-ups, and what goes to the disk."""
    threads, done = Threads(), list[Piece]()
    executor: Executor = getattr(threads, kind)

    def submit(tenant: str, count: int) -> None:
        calls.enter(calls.Call("r", Caller(tenant=tenant)))
        for _ in range(count):
            executor.submit(Piece(tenant, done))

    with held(executor, 2):
        contextvars.copy_context().run(submit, "flood", 100)
        contextvars.copy_context().run(submit, "quiet", 1)
    executor.shutdown()
    threads.shutdown()
    assert len(done) == 101
    assert "quiet" in [p.tenant for p in done[:4]]  # two threads, and each may have been overtaken


def test_where_threads_are_wanting_none_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that cannot have them all ends with an error: it does not hang at its end."""
    start, begun = threading.Thread.start, list[threading.Thread]()

    def first_only(thread: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", first_only)
    with pytest.raises(RuntimeError, match="can't start"):
        TurnExecutor(2, "turns")
    begun[0].join(20)
    assert not begun[0].is_alive()
