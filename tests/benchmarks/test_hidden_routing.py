"""What pooling costs the streams, from the steps that a clock saw."""

from __future__ import annotations

import pytest

from benchmarks.hidden_routing import StepClock


def test_the_ratio_is_of_all_time_to_that_without_pooling() -> None:
    clock = StepClock()
    clock.steps = [(1.0, 9.0, 8.0), (2.0, 1.5, 0.5), (3.0, 1.0, 0.0), (4.0, 9.0, 8.0)]
    assert clock.ratio(1.5, 3.5) == pytest.approx(2.5 / 2.0)
