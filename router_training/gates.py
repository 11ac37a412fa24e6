"""Fitting the gates and the threshold of abstention on scored prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mora_serve.router.evidence import Evidence
from mora_serve.router.format import Calibration, Gate
from mora_serve.router.gate import opened

Array = npt.NDArray[np.float64]

REJECTED = 0.05  # share of in-domain prompts that the base may get
SEVERAL = 2.0  # how much more the further candidates count of prompts for several adapters
PRIOR = 1e-5  # of the gates' squared weights, against the mean log-likelihood

WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"known": 1.0, "new": 2.0, "mixture": 3.0, "near": 1.0, "far": 0.5}
)
"""How much all prompts of a kind count in the gates' fit, in one scoring."""


class Case(NamedTuple):
    """What a router saw of a prompt.

    ``right`` are the adapters that have to run, ``weight`` is how much it counts in a fit,
    ``kind`` is for the report.
    """

    seen: Evidence
    right: frozenset[str]
    weight: float
    kind: str

    def labels(self) -> list[bool]:
        """Whether each candidate is right."""
        return [name in self.right for name in self.seen.names]


def fit_gates(cases: Sequence[Case], blend: float) -> Calibration:
    """The likeliest gates, and the threshold.

    The base gets at most REJECTED of the prompts that some adapter is right for, and only those
    whose best candidate is likelier wrong than right.
    """
    labels = [case.labels() for case in cases]
    weights = np.array([case.weight for case in cases])
    factors = np.array([SEVERAL if len(case.right) > 1 else 1.0 for case in cases])
    first = logistic(
        np.stack([case.seen.first for case in cases]), [own[0] for own in labels], weights
    )
    further = logistic(
        np.concatenate([case.seen.further for case in cases]),
        [right for own in labels for right in own[1:]],
        np.repeat(weights * factors, [len(own) - 1 for own in labels]),
    )
    inside = [opened(first, case.seen.first[None])[0] for case in cases if case.right]
    return Calibration(min(0.5, conformal(np.array(inside))), blend, first, further)


def conformal(scores: Array) -> float:
    """The score that a new one of the same kind falls below with probability REJECTED at most."""
    rank = math.floor(REJECTED * (len(scores) + 1))
    return float(np.sort(scores)[max(rank, 1) - 1])


def logistic(inputs: npt.ArrayLike, right: npt.ArrayLike, weights: npt.ArrayLike) -> Gate:
    """The gate under which labels [n] are likeliest given inputs [n, m], by Newton's method.

    A weak prior keeps the weights finite where the two kinds do not overlap.
    """
    x, y = np.asarray(inputs, float), np.asarray(right, float)
    share = np.asarray(weights, float) / np.sum(weights)
    design = np.column_stack([x, np.ones(len(x))])
    theta = np.zeros(design.shape[1])
    prior = PRIOR * np.eye(len(theta))
    prior[-1, -1] = 1e-9
    for _ in range(200):
        p = 0.5 * (1 + np.tanh(0.5 * design @ theta))
        gradient = design.T @ (share * (p - y)) + prior @ theta
        hessian = (design.T * (share * p * (1 - p))) @ design + prior
        step = np.linalg.solve(hessian, gradient)
        theta -= step / max(1.0, float(np.abs(step).max()) / 3)
        if np.abs(step).max() < 1e-9:
            break
    return Gate(tuple(float(w) for w in theta[:-1]), float(theta[-1]))
