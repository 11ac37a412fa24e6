"""Steps that do not end are noticed, and told to those who wait."""

from __future__ import annotations

import threading
import time

import pytest

from mora_serve.engine.watchdog import Watchdog
from mora_serve.errors import Unavailable
from tests.engine.faults import FaultyForward
from tests.engine.test_engine import GREEDY, PROMPT


class Watched:
    """A thread that runs one function as a step."""

    def __init__(self, seconds: float) -> None:
        self.stuck = threading.Event()
        self.go_on = threading.Event()
        self.calls = 0
        self.dog = Watchdog(seconds, self._called)

    def _called(self) -> None:
        self.calls += 1
        self.stuck.set()

    def run(self, step) -> threading.Thread:
        def work() -> None:
            with self.dog.step():
                step()
            self.go_on.wait(60)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.dog.start(thread)
        return thread


@pytest.fixture
def watched():
    made = []

    def make(seconds: float) -> Watched:
        made.append(Watched(seconds))
        return made[-1]

    yield make
    for one in made:
        one.go_on.set()
        one.dog.stop()


def test_a_step_that_hangs_is_told_once_with_its_stack(watched, caplog):
    one = watched(0.1)

    def hangs_here() -> None:
        one.go_on.wait(60)

    one.run(hangs_here)
    assert one.stuck.wait(60)
    assert "hangs_here" in caplog.text
    time.sleep(0.3)
    assert one.calls == 1


def test_a_step_that_shows_life_may_take_long(watched):
    """Its time begins anew with every sign."""
    one = watched(2.0)
    done = threading.Event()

    def beats() -> None:
        for _ in range(30):
            time.sleep(0.1)
            one.dog.beat()
        done.set()

    one.run(beats)
    assert done.wait(60)
    assert not one.stuck.is_set()


def test_whoever_waits_between_steps_is_not_stuck(watched):
    one = watched(0.05)
    one.run(lambda: None)
    assert not one.stuck.wait(1.0)


def test_no_limit_watches_nothing(watched):
    one = watched(0.0)
    before = {t for t in threading.enumerate() if t.name == "watchdog"}  # of other tests
    one.run(lambda: one.go_on.wait(60))
    assert {t for t in threading.enumerate() if t.name == "watchdog"} <= before
    assert not one.stuck.is_set()


def test_an_engine_that_hangs_takes_in_nothing_more(make_engine, caplog):
    """Whoever watches it is told, and the log says where it stands."""
    local = make_engine(step_seconds=1.0, check=False)
    go_on, failed = threading.Event(), threading.Event()
    local.engine.start(lambda events: None, failed.set)
    FaultyForward(local.engine, before=lambda batch: go_on.wait(60))
    local.engine.submit(local.request((PROMPT, {}, GREEDY)))
    try:
        assert failed.wait(60)
        with pytest.raises(Unavailable) as caught:
            local.engine.submit(local.request((PROMPT, {}, GREEDY)))
        assert caught.value.reason == "ENGINE_FAILED"
        assert "go_on.wait" in caplog.text
        assert local.engine.alive
    finally:
        go_on.set()
    local.engine.stop()
    assert not local.engine.alive


def test_an_engine_at_work_is_not_taken_for_stuck(make_engine):
    """Many steps, each shorter than the limit, are longer than it together."""
    local = make_engine(step_seconds=3.0)
    failed, ended = threading.Event(), threading.Event()
    local.engine.start(
        lambda events: ended.set() if any(getattr(e, "finish", None) for e in events) else None,
        failed.set,
    )
    FaultyForward(local.engine, before=lambda batch: time.sleep(0.3))
    local.engine.submit(local.request((PROMPT, {}, GREEDY)))
    assert ended.wait(60)
    assert not failed.is_set()
