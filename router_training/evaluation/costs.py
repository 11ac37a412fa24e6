"""What a way to route costs: a whole fitting, and one adapter that joins after it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from router_training.evaluation.cases import FittingData
from router_training.evaluation.scored import Fitted, Method, Scorer

_NEWCOMER = "a newcomer"


def timed_fit(
    method: Method, data: FittingData, cards: Mapping[str, Sequence[str]]
) -> tuple[Fitted, Scorer, float]:
    """A fitting, the same with all of ``cards`` registered, and the seconds of both."""
    started = time.perf_counter()
    fitted = method(data)
    scorer = fitted.register(cards)
    return fitted, scorer, round(time.perf_counter() - started, 2)


def join_ms(fitted: Fitted, cards: Mapping[str, Sequence[str]]) -> float:
    """The median milliseconds of registering one adapter that the fitting has not seen.

    Each of ``cards`` in turn is the newcomer's, under a name of its own.
    """
    found = []
    for prompts in cards.values():
        started = time.perf_counter()
        fitted.register({_NEWCOMER: prompts})
        found.append(1e3 * (time.perf_counter() - started))
    return round(float(np.median(found)), 3)
