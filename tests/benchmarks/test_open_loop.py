"""Open-loop load: arrivals do not wait, latencies count from when a request was due."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.open_loop import Outcome, draw, percentiles, play, poisson, popularity, summary
from mora_serve.errors import ResourceExhausted


def test_poisson_arrivals_come_at_their_rate_and_unevenly() -> None:
    times = poisson(50.0, 200.0, random.Random(1))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(times) / 200.0 == pytest.approx(50.0, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)


@given(st.floats(0.1, 100.0), st.floats(0.1, 5.0), st.integers())
def test_arrivals_are_in_order_and_within_the_time(rate: float, seconds: float, seed: int) -> None:
    times = poisson(rate, seconds, random.Random(seed))
    assert times == sorted(times)
    assert all(0.0 < t < seconds for t in times)


def test_zipf_gives_the_second_half_of_the_firsts_share() -> None:
    shares = popularity("zipf", 4)
    assert [s / shares[0] for s in shares] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert popularity("uniform", 4) == [0.25] * 4
    with pytest.raises(ValueError, match="give uniform or zipf"):
        popularity("equal", 4)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers())
def test_a_mixture_has_as_many_different_names_as_asked(sizes: tuple[int, int], seed: int) -> None:
    count, size = sizes
    names = [f"a{i}" for i in range(count)]
    drawn = draw(names, popularity("zipf", count), size, random.Random(seed))
    assert len(drawn) == len(set(drawn)) == size
    assert set(drawn) <= set(names)


def test_names_are_drawn_by_their_shares() -> None:
    rng = random.Random(0)
    counts = Counter(draw("ab", (0.8, 0.2), 1, rng)[0] for _ in range(2000))
    assert counts["a"] / 2000 == pytest.approx(0.8, abs=0.03)


async def test_a_request_is_sent_while_earlier_ones_have_no_answer() -> None:
    """The first answer comes only after the last request was sent: a closed loop would hang."""
    sent: list[int] = []
    all_sent = asyncio.Event()

    async def ask(i: int) -> AsyncIterator[int]:
        sent.append(i)
        if len(sent) == 5:
            all_sent.set()
        await all_sent.wait()
        yield 1

    outcomes = await play([0.04, 0.0, 0.01, 0.02, 0.03], ask)
    assert sent == [1, 2, 3, 4, 0]
    assert all(not o.error and o.tokens == 1 for o in outcomes)
    assert outcomes[1].first_token >= 0.03  # it was due first, and waited for the last


async def test_time_that_the_sender_loses_counts() -> None:
    """Something holds the client's loop up: the request is sent late, and its latency says so."""

    async def ask(i: int) -> AsyncIterator[int]:
        if i == 0:
            time.sleep(0.2)  # not asyncio's: the loop stands still
        yield 1

    first, second = await play([0.0, 0.05], ask)
    assert second.sent - second.due >= 0.1
    assert second.first_token >= 0.1
    assert first.first_token >= 0.2


async def test_an_error_is_counted_by_its_code_and_others_are_raised() -> None:
    async def ask(i: int) -> AsyncIterator[int]:
        if i == 1:
            raise ResourceExhausted("queue: full")
        if i != 2:
            yield 2

    result = summary(await play([0.0, 0.0, 0.0], ask))
    assert (result["answered"], result["failed"]) == (1, 2)
    assert result["errors"] == {"RESOURCE_EXHAUSTED": 1, "EMPTY": 1}

    async def broken(i: int) -> AsyncIterator[int]:
        raise KeyError(i)
        yield 1

    with pytest.raises(ExceptionGroup):
        await play([0.0], broken)


def test_a_summary_counts_rates_over_the_whole_time_and_gaps_between_messages() -> None:
    outcomes = [
        Outcome(1.0, 1.5, 4.0, [(2.0, 1), (2.5, 3), (4.0, 1)]),
        Outcome(2.0, 2.0, 5.0, [(5.0, 5)]),
        Outcome(2.5, 2.5, 2.6, [], "UNAVAILABLE"),
    ]
    result = summary(outcomes)
    assert result["tokens_per_second"] == 2.0
    assert result["requests_per_second"] == pytest.approx(0.4)
    assert result["first_token_ms"]["max"] == pytest.approx(3000.0)
    assert result["first_token_ms"]["p50"] == pytest.approx(2000.0)
    assert result["inter_token_ms"]["p50"] == pytest.approx(1000.0)
    assert result["late_ms"]["max"] == pytest.approx(500.0)


def test_nothing_has_no_percentiles() -> None:
    assert percentiles([]) == {}
    assert summary([])["requests_per_second"] == 0.0
