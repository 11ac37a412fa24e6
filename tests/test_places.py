"""Limited places: what a tenant may hold, and when the refused are told to come back."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mora_serve.places import LEAST_RETRY, MOST_RETRY, SPREAD, most, retry_after

shares = st.floats(0.01, 1.0)


@given(st.integers(1, 5000), st.data(), shares)
def test_a_tenant_gets_one_place_at_least_and_never_more_than_are_left(
    places: int, data: st.DataObject, share: float
) -> None:
    others = data.draw(st.integers(0, places))
    allowed = most(places, others, share)
    assert allowed <= places - others
    assert allowed >= 1 or others == places


@given(st.integers(8, 2000), st.integers(1, 6))
def test_however_many_take_all_they_may_somebody_new_finds_a_place(
    places: int, tenants: int
) -> None:
    """Tenants that take turns until none may take more leave room for one more tenant."""
    held = [0] * tenants
    grown = True
    while grown:
        grown = False
        for i in range(tenants):
            if held[i] < most(places, sum(held) - held[i]):
                held[i] += 1
                grown = True
    assert most(places, sum(held)) >= 1
    assert max(held) - min(held) <= 1


def test_a_whole_share_leaves_nothing() -> None:
    assert most(10, 3, 1.0) == 7
    assert most(10, 10, 1.0) == 0


@given(st.floats(0.0, 1e6), st.integers())
def test_a_retry_is_never_told_before_the_wait_is_over(wait: float, seed: int) -> None:
    seconds = retry_after(wait, random.Random(seed))
    assert min(wait, MOST_RETRY) <= seconds
    assert LEAST_RETRY <= seconds <= (1 + SPREAD) * MOST_RETRY


def test_those_refused_together_are_told_different_times() -> None:
    rng = random.Random(0)
    assert len({retry_after(2.0, rng) for _ in range(50)}) == 50
    assert 1.0 <= retry_after(None, rng) <= 1.5
