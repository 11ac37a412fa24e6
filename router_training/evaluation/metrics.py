"""The measures themselves: plain functions of arrays, the same for every method compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.intp]


def mean(values: Sequence[float] | Array | Bools) -> float:
    """The mean to four digits; 0 of nothing."""
    return round(float(np.mean(values)), 4) if len(values) else 0.0


def ranks(ranking: Array, truth: Ints) -> Ints:
    """How many adapters stand before the right one [n], from ranking [n, a] and columns [n].

    An equal score counts as standing before: a router that says nothing is right about nothing.
    """
    right = np.take_along_axis(ranking, truth[:, None], 1)
    out: Ints = (ranking >= right).sum(1) - 1
    return out


def all_on_top(ranking: Array, wanted: Bools) -> Bools:
    """Whether the adapters of [n, a] ``wanted`` are exactly the best ones [n]."""
    lowest = np.where(wanted, ranking, np.inf).min(1)
    highest = np.where(wanted, -np.inf, ranking).max(1)
    out: Bools = lowest > highest
    return out


def roc(inside: Array, outside: Array) -> tuple[Array, Array]:
    """(false, true) positive rates, both rising, of taking what scores at least a threshold.

    Every distinct score is a threshold. The first point is (0, 0), the last (1, 1).
    """
    scores = np.concatenate([inside, outside])
    own = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    true = np.cumsum(own[order])[last] / len(inside)
    false = np.cumsum(1 - own[order])[last] / len(outside)
    return np.append(0.0, false), np.append(0.0, true)


def reliability(probability: Array, right: Bools, bins: int = 10) -> dict[str, Any]:
    """Equal-mass bins of probabilities [n] against how often they were right [n].

    ``error`` is the expected calibration error: the mean over prompts of the distance between a
    bin's mean probability and its share of right ones. Equal probabilities may fall into two
    bins, in the order in which they come.
    """
    order = np.argsort(probability, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    rows = [
        {
            "probability": round(float(probability[part].mean()), 4),
            "right": round(float(right[part].mean()), 4),
            "prompts": len(part),
        }
        for part in parts
        if len(part)
    ]
    gaps = [row["prompts"] * abs(row["probability"] - row["right"]) for row in rows]
    return {"error": round(sum(gaps) / max(1, len(order)), 4), "bins": rows}


def thinned(x: Array, y: Array, points: int = 60) -> tuple[list[float], list[float]]:
    """A rising curve with at most ``points`` points, for drawing: ends and corners are kept."""
    if len(x) > points:
        along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
        kept = np.unique(np.searchsorted(along, np.linspace(0, along[-1], points)))
        x, y = x[kept], y[kept]
    return np.round(x, 4).tolist(), np.round(y, 4).tolist()
