"""The forecast beside an engine whose seconds are known."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.engine.forecast import Forecast, Load

PLACES = 16


def cost(decodes: int, prompt_tokens: int) -> float:
    return 0.01 * bool(decodes) + 0.0005 * decodes + 0.0002 * prompt_tokens


def learnt(decodes: int = PLACES, steps: int = 200) -> Forecast:
    """One that has seen steps of that cost, every fourth with a chunk of 64 prompt tokens."""
    forecast = Forecast()
    for i in range(steps):
        prompt = 64 if i % 4 == 3 else 0
        forecast.stepped(decodes, prompt, cost(decodes, prompt))
    return forecast


def simulated(
    running: list[int], ahead: list[int], output: int, prompt: int = 64
) -> tuple[float, float]:
    """Seconds until the place and the end of one more request, first come first served.

    Others come after it, so that the batch stays full.
    """
    line = [*ahead, output, *([output] * 10 * PLACES)]
    left = dict(enumerate(running))
    number, now, placed = len(running), 0.0, -1.0
    last = number + len(ahead)
    while True:
        chunk = 0
        while line and len(left) < PLACES:
            left[number] = line.pop(0)
            chunk += prompt
            if number == last:
                placed = now
            number += 1
        now += cost(len(left), chunk)
        left = {i: n - 1 for i, n in left.items() if n > 1}
        if placed >= 0 and last not in left:
            return placed, now


def load(running: list[int], ahead: list[int], prompt: int = 64) -> Load:
    return Load(
        PLACES,
        running=len(running),
        running_output=sum(running),
        waiting=len(ahead),
        waiting_prompt=prompt * len(ahead),
        waiting_output=sum(ahead),
        ahead=len(ahead),
    )


def test_before_the_first_step_nothing_is_known() -> None:
    forecast = Forecast()
    assert not forecast.known
    forecast.stepped(1, 0, 0.01)
    assert forecast.known


@given(st.integers(0, PLACES - 1), st.integers(1, 500))
def test_with_a_place_free_there_is_no_wait(running: int, output: int) -> None:
    expected = learnt().expected(64, output, load([100] * running, []))
    assert expected.place == 0.0
    assert 0 < expected.first_token <= expected.end


@pytest.mark.parametrize("ahead", [0, 8, 40, 200])
def test_the_wait_in_a_full_batch_is_about_what_it_takes(ahead: int) -> None:
    """Within a third, or a quarter of one answer, with answers at all stages of their way."""
    rng = random.Random(ahead)
    forecast = learnt()
    running = [rng.randint(1, 100) for _ in range(PLACES)]
    waiting = [100] * ahead
    place, end = simulated(running, waiting, 100)
    expected = forecast.expected(64, 100, load(running, waiting))
    answer = 100 * cost(PLACES, 0)
    assert expected.place == pytest.approx(place, rel=0.33, abs=0.25 * answer)
    assert expected.end == pytest.approx(end, rel=0.33, abs=0.25 * answer)


@given(st.integers(0, 300), st.integers(1, 400), st.integers(0, 400), st.integers(0, 64))
def test_more_ahead_is_never_a_shorter_wait(
    waiting: int, each: int, remaining: int, ahead: int
) -> None:
    forecast = learnt()
    line = load([remaining] * PLACES, [each] * max(waiting, ahead))
    near = forecast.expected(64, 100, dataclasses.replace(line, ahead=ahead))
    far = forecast.expected(64, 100, line)
    assert near.place <= far.place
    assert near.place <= near.first_token <= near.end


@given(st.integers(1, 64), st.integers(0, 500), st.floats(1e-5, 10.0), st.integers(1, 1000))
def test_whatever_a_step_takes_the_forecast_is_a_number(
    decodes: int, prompt: int, seconds: float, output: int
) -> None:
    forecast = Forecast()
    forecast.stepped(0, prompt, seconds)
    forecast.stepped(decodes, prompt, seconds)
    forecast.stepped(decodes, 0, seconds)
    expected = forecast.expected(prompt, output, load([5] * PLACES, [7] * 3))
    assert 0 <= expected.place <= expected.first_token <= expected.end < float("inf")


def test_answers_that_end_early_shorten_the_wait() -> None:
    long, short = learnt(), learnt()
    for _ in range(100):
        long.ended(400, 400)
        short.ended(400, 40)
    line = load([400] * PLACES, [400] * 50)
    assert short.expected(64, 400, line).end < 0.2 * long.expected(64, 400, line).end


def test_prompts_found_in_the_cache_cost_less() -> None:
    fresh, cached = learnt(), learnt()
    for _ in range(100):
        fresh.started(1000, 0)
        cached.started(1000, 900)
    assert cached.service(1000, 1) < 0.5 * fresh.service(1000, 1)


def test_one_slow_step_does_not_spoil_the_forecast() -> None:
    forecast = learnt()
    before = forecast.service(64, 100)
    forecast.stepped(PLACES, 0, 60.0)
    assert forecast.service(64, 100) < 1.5 * before


def test_it_follows_an_engine_that_becomes_slower() -> None:
    forecast = learnt()
    before = forecast.service(64, 100)
    for _ in range(60):
        forecast.stepped(PLACES, 0, 3 * cost(PLACES, 0))
    assert forecast.service(64, 100) > 2 * before


def test_waits_that_were_foretold_wrongly_are_corrected() -> None:
    """As far as it is the rule, and within bounds."""
    forecast, line = learnt(), load([100] * PLACES, [100] * 50)
    before = forecast.expected(64, 100, line).place
    for _ in range(100):
        forecast.waited(1.0, 1.5)
    assert forecast.expected(64, 100, line).place == pytest.approx(1.5 * before)
    assert forecast.uncorrected(64, 100, line) == before
    for _ in range(100):
        forecast.waited(1.0, 1000.0)
    assert forecast.expected(64, 100, line).place == pytest.approx(3 * before)
