"""The limit on prompt tokens: where it settles, and what it must never do."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.engine.pace import MIN_TOKENS, StepPace

Cost = Callable[[int, int], float]  # decodes, prompt tokens -> seconds


def linear(decodes: int, tokens: int) -> float:
    return 0.005 + 0.0005 * decodes + 0.0002 * tokens


def stepped(decodes: int, tokens: int) -> float:
    """As on a CPU: few rows in a fused product, many dense, after dequantising."""
    rows = decodes + tokens
    return 0.012 + (0.02 + 0.0002 * rows if rows >= 64 else 0.0003 * rows)


def run(pace: StepPace, cost: Cost, decodes: int, steps: int, prompts: int = 1) -> list[int]:
    """The limits of consecutive steps, each with as many prompt tokens as it may have."""
    limits = []
    for i in range(steps):
        tokens = 0 if i % 8 == 0 else pace.limit(decodes, prompts)
        pace.observe(decodes, tokens, cost(decodes, tokens))
        limits.append(tokens)
    return limits


def test_without_streams_nothing_is_limited() -> None:
    pace = StepPace(2.0, 512)
    run(pace, linear, 16, 40)
    assert pace.limit(0, 5) == 512


def test_zero_switches_it_off() -> None:
    pace = StepPace(0.0, 512)
    run(pace, linear, 16, 40)
    assert pace.limit(16, 1) == 512


def test_the_first_step_with_streams_is_measured_without_prompts() -> None:
    pace = StepPace(2.0, 512)
    assert pace.limit(1, 1) == 0
    pace.observe(1, 0, 0.01)
    assert pace.limit(1, 1) == MIN_TOKENS


@given(
    st.floats(1.0, 4.0),
    st.floats(1e-4, 0.1),
    st.floats(0.0, 1e-3),
    st.floats(1e-6, 1e-2),
    st.integers(1, 64),
)
def test_a_step_takes_at_most_as_many_times_the_seconds_as_configured(
    factor: float, fixed: float, row: float, token: float, decodes: int
) -> None:
    """Where the cost is proportional, exactly so many tokens as fit, within the two ends."""

    def cost(decodes: int, tokens: int) -> float:
        return fixed + row * decodes + token * tokens

    pace = StepPace(factor, 512)
    limit = run(pace, cost, decodes, 60)[-1]
    best = (factor - 1) * cost(decodes, 0) / token
    assert limit == pytest.approx(min(512, max(MIN_TOKENS, best)), rel=0.01, abs=1)


def test_where_the_cost_jumps_the_steps_keep_the_pace_on_average() -> None:
    pace = StepPace(2.0, 512)
    limits = run(pace, stepped, 16, 400)[200:]
    seconds = [stepped(16, n) for n in limits if n]
    assert sum(seconds) / len(seconds) <= 2.1 * stepped(16, 0)
    assert min(n for n in limits if n) >= MIN_TOKENS


def test_more_who_wait_than_stream_make_the_streams_give_way_in_proportion() -> None:
    pace = StepPace(2.0, 10_000)
    few = run(pace, linear, 20, 60, prompts=20)[-1]
    many = run(pace, linear, 20, 60, prompts=60)[-1]
    assert many == pytest.approx(3 * few, rel=0.02)


def test_one_slow_step_does_not_shrink_the_chunks_for_long() -> None:
    """A step that the machine held up counts a few times what was expected at most."""
    pace = StepPace(2.0, 512)
    before = run(pace, linear, 16, 60)[-1]
    pace.observe(16, before, 60.0)
    pace.observe(16, 0, 60.0)
    assert run(pace, linear, 16, 160)[-1] == pytest.approx(before, rel=0.05)


def test_the_short_end_of_a_prompt_does_not_shrink_the_next_chunk() -> None:
    pace = StepPace(2.0, 512)
    before = run(pace, linear, 16, 60)[-1]
    assert before > 4 * MIN_TOKENS
    pace.observe(16, 1, linear(16, 1))
    assert pace.limit(16, 1) == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("settled", [0, 60])
def test_prompts_that_cost_nothing_measurable_grow_step_by_step(settled: int) -> None:
    """One slow step without prompts must not make the next one 512 tokens long."""
    pace = StepPace(2.0, 512)
    before = (run(pace, linear, 1, settled) or [0])[-1]
    pace.observe(4, 0, 60.0)
    limits = []
    for _ in range(10):
        limits.append(pace.limit(4, 1))
        pace.observe(4, limits[-1], 0.02)
    assert limits[0] <= max(2 * before, MIN_TOKENS)
    assert all(a <= b <= 2 * a for a, b in itertools.pairwise(limits))
    assert limits[-1] == 512


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(1e-4, 10.0)), max_size=20))
def test_a_pace_of_one_is_the_smallest_chunk_whatever_was_measured(
    steps: list[tuple[int, float]],
) -> None:
    pace = StepPace(1.0, 512)
    pace.observe(4, 0, 0.01)
    for tokens, seconds in steps:
        pace.observe(4, tokens * MIN_TOKENS, seconds)
    assert pace.limit(4, 3) == MIN_TOKENS


def test_the_seconds_are_those_of_as_many_streams() -> None:
    """One stream's quick steps do not limit the chunks beside thirty."""
    pace = StepPace(2.0, 512)
    run(pace, linear, 1, 60)
    run(pace, linear, 30, 60)
    assert pace.limit(30, 1) > 2 * pace.limit(1, 1)
