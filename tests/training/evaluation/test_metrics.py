"""The measures against plain statements of what they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_training.evaluation import metrics
from router_training.router_report import auroc

SCORES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=25).map(np.array)
SHARES = st.lists(st.integers(0, 100).map(lambda n: n / 100), min_size=1, max_size=60)


@given(SCORES, SCORES)
def test_the_area_under_a_roc_curve_is_the_share_of_ordered_pairs(inside, outside):
    """Ties count half."""
    above = (inside[:, None] > outside).mean()
    equal = (inside[:, None] == outside).mean()
    false, true = metrics.roc(inside, outside)
    assert np.trapezoid(true, false) == pytest.approx(above + equal / 2)
    assert auroc(inside, outside) == pytest.approx(above + equal / 2)


@given(SCORES, SCORES)
def test_a_roc_curve_rises_from_nothing_to_all(inside, outside):
    """Every threshold takes at least what a higher one takes."""
    false, true = metrics.roc(inside, outside)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert (np.diff(false) >= 0).all()
    assert (np.diff(true) >= 0).all()


@given(SCORES, SCORES, st.integers(0, 6))
def test_a_roc_curve_has_the_point_of_every_threshold(inside, outside, threshold):
    """What scores at least a threshold is on the curve."""
    false, true = metrics.roc(inside, outside)
    point = ((outside >= threshold).mean(), (inside >= threshold).mean())
    assert np.isclose([false, true], np.array(point)[:, None]).all(0).any()


@given(st.integers(2, 400), st.integers(2, 80))
def test_a_thinned_curve_keeps_its_ends(count, points):
    """Few points are left, all of the curve."""
    x = np.linspace(0, 1, count)
    y = x**0.2
    kept_x, kept_y = metrics.thinned(x, y, points)
    assert len(kept_x) <= max(points, 2)
    assert (kept_x[0], kept_y[0], kept_x[-1], kept_y[-1]) == (0, 0, 1, 1)
    assert set(kept_x) <= set(np.round(x, 4).tolist())


@given(SHARES, st.data())
def test_bins_of_a_reliability_diagram_hold_equally_many(probability, data):
    """No bin has more than one prompt more than another, and together they have all."""
    right = np.array(data.draw(st.lists(st.booleans(), min_size=len(probability), max_size=60)))
    found = metrics.reliability(np.array(probability), right[: len(probability)])
    sizes = [row["prompts"] for row in found["bins"]]
    assert sum(sizes) == len(probability)
    assert max(sizes) - min(sizes) <= 1
    assert 0 <= found["error"] <= 1


def test_calibration_error_is_the_distance_over_prompts():
    """A router that says 0.9 and is right half of the time is off by 0.4; one that knows, by 0."""
    right = np.array([True, False] * 10)
    assert metrics.reliability(np.full(20, 0.9), right)["error"] == pytest.approx(0.4)
    assert metrics.reliability(right.astype(float), right)["error"] == 0.0


@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=8))
def test_ranks_count_whoever_scores_as_high(rows):
    """An adapter that ties with the right one stands before it."""
    ranking = np.array(rows, float)
    found = metrics.ranks(ranking, np.zeros(len(rows), np.intp))
    for row, rank in zip(rows, found, strict=True):
        assert rank == sum(other >= row[0] for other in row[1:])


@given(
    st.lists(st.integers(0, 4), min_size=4, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4).filter(lambda w: 0 < sum(w) < 4),
)
def test_all_on_top_means_strictly_above_all_others(scores, wanted):
    """Every wanted adapter scores more than every other one."""
    right = [s for s, w in zip(scores, wanted, strict=True) if w]
    rest = [s for s, w in zip(scores, wanted, strict=True) if not w]
    found = metrics.all_on_top(np.array([scores], float), np.array([wanted]))
    assert found.tolist() == [all(r > o for r in right for o in rest)]


def test_the_mean_of_nothing_is_nothing():
    """No prompts, no share."""
    assert metrics.mean([]) == 0.0
    assert metrics.mean([True, False, False]) == 0.3333
