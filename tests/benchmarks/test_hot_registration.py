"""Pauses of streams, from the steps that a recorder saw."""

from __future__ import annotations

from benchmarks.hot_registration import longest_gaps, step_seconds

# a and b run at every step but for b's pause from 2.0 to 5.0; "other" is no stream.
STEPS = [
    (time, frozenset(f"s-{r}" for r in running) | {"other"})
    for time, running in ((1.0, "ab"), (2.0, "ab"), (3.0, "a"), (5.0, "ab"), (5.5, "ab"))
]


def test_the_longest_pause_is_the_worst_streams() -> None:
    assert longest_gaps(STEPS, "s-") == (1, 3.0)
    assert longest_gaps(STEPS, "s-a") == (0, 2.0)


def test_a_pause_counts_in_full_in_every_window_that_it_touches() -> None:
    assert longest_gaps(STEPS, "s-", 4.5, 4.6) == (1, 3.0)
    assert longest_gaps(STEPS, "s-", 2.5, 2.6) == (1, 3.0)


def test_a_pause_outside_the_window_does_not_count() -> None:
    assert longest_gaps(STEPS, "s-", 5.0, 9.0) == (0, 0.5)
    assert longest_gaps(STEPS, "s-", 0.0, 2.0) == (0, 1.0)


def test_steps_are_those_within_the_window() -> None:
    assert step_seconds(STEPS, 1.5, 5.2) == [1.0, 2.0]
