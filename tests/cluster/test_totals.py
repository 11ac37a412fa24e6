"""Several engines as one: sums that Prometheus can go by."""

from __future__ import annotations

from mora_serve.cluster.totals import ABSENT, Totals
from mora_serve.core import EngineStats


def made(tokens: int, **gauges: object) -> EngineStats:
    return EngineStats(generation_tokens=tokens, page_size=16, slots=8, **gauges)


def test_engines_add_up():
    one, two = made(5, running=1, resident=("b",)), made(7, running=3, resident=("a", "b"))
    sum_ = Totals().of({"one": one, "two": two})
    assert (sum_.running, sum_.page_size, sum_.slots) == (4, 16, 16)
    assert sum_.generation_tokens == 12
    assert sum_.resident == ("a", "b")
    assert Totals().of({}) == EngineStats()


def test_counters_do_not_fall_when_a_replica_goes_and_gauges_do():
    totals = Totals()
    totals.of({"one": made(500, running=1), "two": made(300, running=2)})
    left = totals.of({"two": made(310, running=2)})
    assert (left.generation_tokens, left.running, left.slots) == (810, 2, 8)
    assert totals.of({}).generation_tokens == 810
    back = totals.of({"one": made(505, running=1), "two": made(310)})  # it was only slow
    assert back.generation_tokens == 815


def test_those_long_gone_count_and_are_forgotten():
    totals = Totals()
    for i in range(3 * ABSENT):
        assert totals.of({f"r{i}": made(10)}).generation_tokens == 10 * (i + 1)
    assert len(totals._last) <= ABSENT + 1
