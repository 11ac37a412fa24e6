"""A tenant's limits: never more calls than they allow, and never a call of another's refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.access import limits as module
from mora_serve.access.limits import Limits, Meter
from mora_serve.errors import ResourceExhausted


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(meter: Meter, tenant: str, limits: Limits) -> ResourceExhausted | None:
    try:
        with meter.passing(tenant, limits):
            return None
    except ResourceExhausted as e:
        return e


def test_calls_at_the_same_time_are_counted_by_tenant() -> None:
    meter, limits = Meter(), Limits(concurrency=2)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(meter.passing("a", limits))
        error = refused(meter, "a", limits)
        assert error is not None
        assert (error.reason, error.retry_after) == ("TENANT_CONCURRENCY", 1.0)
        assert refused(meter, "b", limits) is None
    assert refused(meter, "a", limits) is None


def test_a_call_that_fails_leaves_its_place() -> None:
    meter, limits = Meter(), Limits(concurrency=1)
    with pytest.raises(ValueError, match="x"), meter.passing("a", limits):
        raise ValueError("x")
    assert refused(meter, "a", limits) is None


def test_a_refusal_says_when_the_next_call_is_let_in() -> None:
    clock = Clock()
    meter, limits = Meter(clock), Limits(requests_per_second=0.5, burst=2)
    assert [refused(meter, "a", limits) for _ in range(2)] == [None, None]
    error = refused(meter, "a", limits)
    assert error is not None
    assert error.reason == "TENANT_RATE"
    assert error.retry_after == pytest.approx(2.0)
    clock.now += 2.0
    assert refused(meter, "a", limits) is None


@given(
    st.lists(st.floats(0, 3), max_size=60),
    st.floats(0.25, 20),
    st.one_of(st.none(), st.integers(1, 10)),
)
def test_in_no_span_of_time_are_there_more_calls_than_the_rate_and_the_burst(
    pauses, rate, burst
) -> None:
    clock = Clock()
    meter, limits = Meter(clock), Limits(requests_per_second=rate, burst=burst)
    let_in = []
    for pause in pauses:
        clock.now += pause
        if refused(meter, "a", limits) is None:
            let_in.append(clock.now)
    most = max(float(burst or rate), 1.0)
    for i, start in enumerate(let_in):
        for j in range(i, len(let_in)):
            assert j - i + 1 <= most + (let_in[j] - start) * rate + 1e-6


def test_very_many_tenants_take_no_memory_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FORGET", 8)
    clock = Clock()
    meter, limits = Meter(clock), Limits(requests_per_second=1)
    for i in range(100):
        clock.now += 30
        assert refused(meter, f"t{i}", limits) is None
    assert len(meter._uses) <= 9
