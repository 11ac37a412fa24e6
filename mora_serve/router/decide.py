"""From scores to a decision: abstain, or run the adapters that the prompt asks for."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from mora_serve.core import Candidate
from mora_serve.router.features import Floats
from mora_serve.router.format import Calibration
from mora_serve.router.index import Scores

REPORTED = 16  # candidates in a decision, unless more adapters may run


class Choice(NamedTuple):
    """What the router picks, best first (nothing where it abstains), and the best candidates."""

    adapters: tuple[str, ...]
    candidates: tuple[Candidate, ...]


def decide(scores: Scores, calibration: Calibration, max_adapters: int) -> Choice:
    """Pick at most ``max_adapters`` adapters; the order of ``scores`` does not matter.

    It abstains where no adapter's impostor-normed score reaches the threshold. Otherwise the
    adapter with the best cosine runs, and with it those whose probability is above 0.5, best
    first, one of each non-empty group: near ties in a group are ways to do one thing.
    """
    rows = best_rows(scores, max(REPORTED, max_adapters))
    candidates = tuple(
        Candidate(scores.names[row], float(scores.cosine[row]), float(probability))
        for row, probability in zip(rows, gate(scores.relative[rows], calibration), strict=True)
    )
    if not candidates or scores.normed.max() < calibration.threshold:
        return Choice((), candidates)
    chosen: list[str] = []
    groups: set[str] = set()
    for row, candidate in zip(rows, candidates, strict=True):
        group = scores.groups[row]
        if chosen and (candidate.probability <= 0.5 or group in groups):
            continue
        chosen.append(candidate.adapter)
        groups |= {group} - {""}
        if len(chosen) == max_adapters:
            break
    return Choice(tuple(chosen), candidates)


def gate(relative: Floats, calibration: Calibration) -> Floats:
    """Probabilities [...] that a prompt is for an adapter: independent, they need not sum to 1."""
    x = (relative - calibration.gate_position) / calibration.gate_width
    probability: Floats = 0.5 * (1 + np.tanh(0.5 * x))  # the logistic function, never overflowing
    return probability


def best_rows(scores: Scores, count: int) -> list[int]:
    """The rows of the ``count`` best cosines, best first, equal ones by name."""
    cosine = scores.cosine
    count = min(count, len(cosine))
    if not count:
        return []
    least = np.partition(cosine, len(cosine) - count)[len(cosine) - count]
    ties = np.flatnonzero(cosine >= least).tolist()
    return heapq.nsmallest(count, ties, key=lambda i: (-cosine[i], scores.names[i]))
