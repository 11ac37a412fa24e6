"""How far off a deadline has to lie."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.engine.margin import LATE, LEAST, MOST, TENANTS, Margin, Margins


@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_few_requests_end_later_than_their_foretold_time_with_the_margin(spread: float) -> None:
    rng, margin, late = random.Random(0), Margin(), 0
    for i in range(4000):
        seconds = rng.lognormvariate(0.0, spread)
        late += i >= 2000 and seconds > margin.value
        margin.ended(1.0, seconds)
    assert late / 2000 == pytest.approx(LATE, abs=0.02)


def test_a_forecast_that_holds_needs_little() -> None:
    margin = Margin()
    for _ in range(20):
        margin.missed()
    missed = margin.value
    for _ in range(2000):
        margin.ended(2.0, 2.0)
    assert LEAST == margin.value < missed


def test_as_many_tenants_as_are_kept_and_no_more() -> None:
    margins = Margins()
    margins.learning("first").missed()
    assert margins.value("first") > LEAST == margins.value("nobody")
    for i in range(TENANTS):
        margins.learning(str(i))
    assert margins.value("first") == LEAST


@given(st.lists(st.one_of(st.none(), st.tuples(st.floats(0.01, 100), st.floats(0, 1000)))))
def test_it_stays_within_its_bounds(happened: list[tuple[float, float] | None]) -> None:
    margin = Margin()
    for one in happened:
        if one is None:
            margin.missed()
        else:
            margin.ended(*one)
        assert LEAST <= margin.value <= MOST
