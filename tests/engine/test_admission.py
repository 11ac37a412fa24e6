"""Who may join the line, and books that always agree with who is there."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.config import EngineConfig
from mora_serve.core import Request, SamplingParams
from mora_serve.engine.admission import Admission
from mora_serve.errors import ResourceExhausted

LIMITS = EngineConfig(max_batch=4, max_queue=8)
STEP = 0.01  # seconds of every step here
OUTPUT = 50


def make(limits: EngineConfig = LIMITS) -> Admission:
    return Admission(limits, random.Random(0))


def request(name: str, tenant: str = "t", deadline: float | None = None) -> Request:
    sampling = SamplingParams(OUTPUT)
    return Request(name, (1,) * 10, sampling, tenant=tenant, deadline=deadline)


def admit(
    admission: Admission, name: str, tenant: str = "t", deadline: float | None = None
) -> None:
    admission.admit(request(name, tenant, deadline), OUTPUT, now=0.0)


def busy(limits: EngineConfig = LIMITS) -> Admission:
    """All places taken by tenant t, steps measured, one answer ended that was all that it may."""
    admission = make(limits)
    admit(admission, "before")
    admission.started("before", 0, now=0.0)
    admission.ended("before", OUTPUT, 0.0, by_itself=True)
    for i in range(limits.max_batch):
        admit(admission, f"running-{i}")
        admission.started(f"running-{i}", 0, now=0.0)
    for _ in range(50):
        admission.stepped(limits.max_batch, 0, 0, STEP, short=False)
    return admission


def refused(admission: Admission, *args: object) -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as e:
        admit(admission, *args)  # type: ignore[arg-type]
    return e.value


def test_a_full_line_refuses_and_says_how_long_it_takes() -> None:
    admission = busy(dataclasses.replace(LIMITS, tenant_queue=1.0))
    for i in range(8):
        admit(admission, str(i))
    error = refused(admission, "more")
    assert error.reason == "QUEUE_FULL"
    assert "the wait is about" in error.message
    # Eight answers of 50 steps, four at a time, behind those that run: a quarter of that.
    assert error.retry_after is not None
    assert 0.25 <= error.retry_after <= 0.75


def test_the_longer_the_wait_the_later_the_retry() -> None:
    def told(waiting: int) -> float:
        admission = busy(dataclasses.replace(LIMITS, max_queue=waiting, tenant_queue=1.0))
        for i in range(waiting):
            admit(admission, str(i))
        return refused(admission, "more").retry_after or 0.0

    assert told(8) < told(32) < told(128)


def test_a_tenant_does_not_take_the_whole_line() -> None:
    """Half of it alone, a third beside another that wants as much; a third tenant finds room."""
    admission = busy()
    for i in range(4):
        admit(admission, f"a{i}", "a")
    assert refused(admission, "a4", "a").reason == "TENANT_QUEUE_FULL"
    for i in range(2):
        admit(admission, f"b{i}", "b")
    assert refused(admission, "b2", "b").reason == "TENANT_QUEUE_FULL"
    admit(admission, "c0", "c")
    admission.started("a0", 0, now=0.0)  # who runs is not in line
    admission.started("a1", 0, now=0.0)
    admission.started("a2", 0, now=0.0)
    admit(admission, "a4", "a")


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    admission = busy()
    service = OUTPUT * STEP
    admit(admission, "patient", deadline=100.0)
    error = refused(admission, "hurried", "t", service)
    assert error.reason == "DEADLINE_UNREACHABLE"
    assert "the wait is about" in error.message
    assert error.retry_after
    assert admission.waiting == 1


def test_what_would_be_refused_is_known_before_anything_is_done_for_it() -> None:
    admission = busy()
    admit(admission, "patient", deadline=100.0)
    expected = admission.expected("t", 10, OUTPUT)
    admission.check("t", 10, OUTPUT, None)
    admission.check("t", 10, OUTPUT, 2 * expected.end)
    with pytest.raises(ResourceExhausted, match="deadline"):
        admission.check("t", 10, OUTPUT, expected.end)
    admission.check("t", 1, 1, expected.end)  # a short answer would be there in time


def test_answers_that_come_later_than_foretold_move_deadlines_away() -> None:
    """A deadline that was far enough is too near on an engine that keeps nobody's time."""
    admission = busy()
    left = 1.5 * admission.expected("t", 10, OUTPUT).end
    admission.check("t", 10, OUTPUT, left)

    def late() -> None:
        for i in range(50):
            admit(admission, f"late-{i}", deadline=left)
            admission.ended(f"late-{i}", 0, left, by_itself=False)

    with pytest.raises(ResourceExhausted, match="deadline"):
        late()
    # Nobody else's deadlines have moved.
    admission.check("another", 10, OUTPUT, 1.5 * admission.expected("another", 10, OUTPUT).end)


def test_who_leaves_says_nothing_of_the_forecast() -> None:
    admission = busy()
    left = 1.5 * admission.expected("t", 10, OUTPUT).end
    for i in range(50):
        admit(admission, f"gone-{i}", deadline=left)
        admission.ended(f"gone-{i}", 0, left / 2, by_itself=False)
    admission.check("t", 10, OUTPUT, left)


def test_without_a_wait_or_a_measurement_no_deadline_is_refused() -> None:
    """Who starts at once may be lucky, and what nobody has measured cannot be foretold."""
    idle = make()
    admit(idle, "first", deadline=1e-3)
    idle.started("first", 0, now=0.0)
    for _ in range(50):
        idle.stepped(1, 0, 0, STEP, short=False)
    admit(idle, "second", deadline=1e-3)
    new = make()
    for i in range(4):
        admit(new, str(i), f"t{i}", 1e-3)


def test_another_tenants_line_is_not_waited_for() -> None:
    """Who has nothing in line is next, so a deadline that its own line would break is met."""
    admission = busy(dataclasses.replace(LIMITS, max_queue=400, tenant_queue=0.9))
    for i in range(300):
        admit(admission, f"a{i}", "a")
    flood = admission.expected("a", 10, OUTPUT).place
    quiet = admission.expected("b", 10, OUTPUT).place
    assert quiet < flood / 20
    assert refused(admission, "late", "a", 2.0).reason == "DEADLINE_UNREACHABLE"
    admit(admission, "in-time", "b", 2.0)


def test_want_of_pages_counts_as_a_full_batch() -> None:
    admission = make()
    admit(admission, "large")
    admission.started("large", 0, now=0.0)
    admission.stepped(1, 0, 1, STEP, short=False)
    assert admission.expected("t", 10, OUTPUT).place == 0.0
    admission.stepped(1, 0, 1, STEP, short=True)
    assert admission.expected("t", 10, OUTPUT).place > 0.0


def test_who_waits_is_let_go_when_its_deadline_is_out_of_reach() -> None:
    admission = busy()
    waiting = [request("soon", deadline=100.0), request("later", deadline=200.0), request("never")]
    for r in waiting:
        admission.admit(r, OUTPUT, now=0.0)
    assert admission.hopeless(waiting, now=50.0) == []
    ((gone, why),) = admission.hopeless(waiting, now=99.9)
    assert gone.id == "soon"
    assert (why.code, why.reason) == ("RESOURCE_EXHAUSTED", "DEADLINE_UNREACHABLE")
    assert why.error().retry_after
    admission.started("soon", 0, now=0.0)
    assert admission.hopeless(waiting, now=99.9) == []  # it has its place


steps = st.lists(
    st.one_of(
        st.tuples(st.just("admit"), st.sampled_from("abcd")),
        st.tuples(st.just("start"), st.integers(0, 40)),
        st.tuples(st.just("end"), st.integers(0, 40)),
        st.tuples(st.just("step"), st.integers(0, 4)),
    ),
    max_size=80,
)


@given(steps, st.integers(1, 6), st.sampled_from([0.3, 0.5, 1.0]))
def test_the_books_agree_with_what_happened(
    happened: list[tuple[str, object]], max_queue: int, share: float
) -> None:
    """Whatever comes and goes: the line's bound holds, and at the end nothing is counted."""
    limits = dataclasses.replace(LIMITS, max_queue=max_queue, tenant_queue=share)
    admission = make(limits)
    waiting: dict[str, str] = {}
    running: dict[str, str] = {}
    for i, (what, value) in enumerate(happened):
        if what == "admit":
            own = Counter(waiting.values())[str(value)]
            try:
                admit(admission, str(i), str(value))
            except ResourceExhausted:
                assert own or len(waiting) == max_queue
            else:
                waiting[str(i)] = str(value)
        elif what == "start" and waiting:
            name = list(waiting)[int(str(value)) % len(waiting)]
            running[name] = waiting.pop(name)
            admission.started(name, 3, now=0.0)
        elif what == "end" and waiting | running:
            name = list(waiting | running)[int(str(value)) % len(waiting | running)]
            admission.ended(name, 7, 0.0, by_itself=name in running)
            waiting.pop(name, None)
            running.pop(name, None)
        elif what == "step":
            admission.stepped(int(str(value)), 5, int(str(value)), STEP, short=False)
        assert admission.waiting == len(waiting) <= max_queue
    for name in waiting | running:
        admission.ended(name, 0, 0.0, by_itself=False)
    assert admission.waiting == 0
    assert admission.expected("a", 1, 1).place == 0.0
    assert not admission._tenants
    assert not admission._lines
    assert not admission._waiting_output
    assert not admission._running_output


def test_before_an_answer_has_ended_no_deadline_is_out_of_reach() -> None:
    """How much of what requests may make they do make is not known yet: it may be very little."""
    admission = make()
    for i in range(LIMITS.max_batch):
        admit(admission, f"running-{i}")
        admission.started(f"running-{i}", 0, now=0.0)
    for _ in range(50):
        admission.stepped(LIMITS.max_batch, 0, 0, STEP, short=False)
    late = request("late", deadline=2 * STEP)
    admission.admit(late, OUTPUT, now=0.0)
    assert admission.hopeless([late], now=STEP) == []
