"""The figures of a fit, by their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from router_training.router_report import FitReport, auroc, calibration_error


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_the_auroc_is_the_usual_one(inside: list[int], others: list[int]) -> None:
    labels = [1] * len(inside) + [0] * len(others)
    assert auroc(inside, others) == pytest.approx(roc_auc_score(labels, inside + others))


def test_the_auroc_of_nothing_is_unknown() -> None:
    assert np.isnan(auroc([], [1.0]))
    assert np.isnan(auroc([1.0], []))


def test_true_probabilities_have_no_calibration_error_and_others_their_distance() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(50_000)
    right = rng.random(50_000) < p
    assert calibration_error(p.tolist(), right.tolist()) < 0.01
    assert calibration_error((0.5 * p).tolist(), right.tolist()) == pytest.approx(0.25, abs=0.01)
    assert calibration_error([0.7] * 10, [True] * 7 + [False] * 3, bins=1) == pytest.approx(0)


def test_weights_count_as_repetitions_do() -> None:
    p, right = [0.2, 0.6, 0.9], [False, True, False]
    once = calibration_error(p, right, [3, 1, 2], bins=1)
    again = calibration_error([0.2] * 3 + [0.6] + [0.9] * 2, [False] * 3 + [True] + [False] * 2)
    assert once == pytest.approx(abs(np.dot([3, 1, 2], np.subtract(p, right))) / 6)
    assert calibration_error(p, right, [3, 1, 2], bins=6) == pytest.approx(again, abs=0.2)


def test_a_figure_that_could_not_be_measured_is_left_out_of_the_file() -> None:
    nan = float("nan")
    report = FitReport(
        *(0.3, 0.5, False, {1: 0.6, 16: 0.9}, 0.99, 0.98, nan, nan, 0.99, 0.02, nan, 0.0, 0.01),
        tried={"0.3_0.5": 0.8},
    )
    numbers = report.numbers()
    assert numbers["held_out_16"] == 0.9
    assert numbers["tried_0.3_0.5"] == 0.8
    assert not {"together", "auroc_near", "accepted_near"} & set(numbers)
