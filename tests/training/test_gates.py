"""The gates' fit: likelihood, and how many prompts the base may get."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mora_serve.router.evidence import Evidence
from mora_serve.router.gate import opened, probabilities
from router_training.gates import REJECTED, Case, conformal, fit_gates, logistic


def case(first: float, further: list[float], right: str, kind: str = "known") -> Case:
    """Candidates a, b, c, …; ``right`` names some of them."""
    names = np.array(list("abcdefgh"[: 1 + len(further)]), object)
    score = np.zeros(len(names), np.float32)
    inputs = np.array([(x, x) for x in further], np.float32).reshape(-1, 2)
    seen = Evidence(names, names, score, np.array([first], np.float32), inputs)
    return Case(seen, frozenset(right), 1.0, kind)


def test_a_gate_is_the_likeliest_one() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 2))
    y = rng.random(4000) < 1 / (1 + np.exp(-(x @ [3.0, -1.0] + 0.5)))
    weights = rng.random(4000)
    gate = logistic(x, y, weights)
    other = LogisticRegression(C=1e6).fit(x, y, weights)
    assert gate.weights == pytest.approx(other.coef_[0], rel=0.02)
    assert gate.bias == pytest.approx(other.intercept_[0], rel=0.05)


def test_kinds_that_do_not_overlap_still_give_a_finite_gate() -> None:
    gate = logistic([[0.0], [0.1], [0.9], [1.0]], [0, 0, 1, 1], np.ones(4))
    assert np.isfinite([*gate.weights, gate.bias]).all()
    assert opened(gate, np.array([[0.2], [0.8]], np.float32)) == pytest.approx([0, 1], abs=0.2)


def test_probabilities_are_the_frequencies() -> None:
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(4000):
        first, further = rng.random(), rng.random(2).tolist()
        right = "a" * (rng.random() < first) + "b" * (rng.random() < further[0] ** 2)
        cases.append(case(first, further, right))
    calibration = fit_gates(cases, 0.5)
    p = np.stack([probabilities(c.seen, calibration) for c in cases])
    labels = np.array([c.labels() for c in cases])
    for half in (p[:, 0] < 0.5, p[:, 0] >= 0.5):
        assert p[half, 0].mean() == pytest.approx(labels[half, 0].mean(), abs=0.04)
    assert calibration.blend == 0.5


def test_the_base_gets_what_is_likelier_wrong_and_few_of_those_that_are_right() -> None:
    rng = np.random.default_rng(0)
    right = [case(x, [], "a") for x in rng.normal(0.6, 0.1, 500)]
    outside = [case(x, [0.0], "") for x in rng.normal(0.2, 0.05, 500)]
    clear = fit_gates(right + outside, 0.5)
    assert clear.threshold == 0.5
    outside = [case(x, [0.0], "") for x in rng.normal(0.6, 0.1, 1500)]
    mixed = fit_gates(right + outside, 0.5)
    assert mixed.threshold < 0.5
    kept = [probabilities(c.seen, mixed)[0] >= mixed.threshold for c in right]
    assert np.mean(kept) == pytest.approx(1 - REJECTED, abs=0.01)


def test_the_threshold_rejects_a_twentieth() -> None:
    rng = np.random.default_rng(0)
    new = rng.normal(size=100_000)
    thresholds = [conformal(rng.normal(size=200)) for _ in range(300)]
    assert np.mean([(new < t).mean() for t in thresholds]) == pytest.approx(0.05, abs=0.005)
