"""Clusters and gates: what they find in made-up points, and rules that hold for any."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from router_training.clusters import (
    TextGate,
    agreed,
    balanced,
    distinct,
    kmeans,
    merge_cheapest,
    softmax,
)


def groups(count, each, seed=0, size=6, spread=0.3):
    """Points around ``count`` centres far apart, and whose they are."""
    rng = np.random.default_rng(seed)
    centres = 10 * np.eye(count, size)
    own = np.repeat(np.arange(count), each)
    return centres[own] + spread * rng.normal(size=(len(own), size)), own


def test_kmeans_finds_groups_that_stand_apart():
    """Four groups become four clusters, whatever the seed."""
    points, own = groups(4, 20)
    for seed in range(5):
        labels = kmeans(points, 4, np.random.default_rng(seed))
        assert adjusted_rand_score(own, labels) == 1.0


@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_clusters_are_numbered_without_gaps(size, count, kinds):
    """Also where points are fewer than clusters, or equal."""
    points = np.random.default_rng(size).integers(0, kinds + 1, (size, 2)).astype(np.float64)
    labels = kmeans(points, count, np.random.default_rng(0))
    assert set(labels) == set(range(labels.max() + 1))
    assert labels.max() < count


def test_the_gate_outvotes_labels_that_are_wrong():
    """A quarter of the rows have another group's label; held out, the gate says the right one."""
    points, own = groups(4, 40, spread=1.0)
    rng = np.random.default_rng(1)
    wrong = rng.random(len(own)) < 0.25
    noisy = np.where(wrong, rng.integers(0, 4, len(own)), own)
    gate = TextGate.fit(points, np.eye(4)[noisy])
    assert (gate.held_out.argmax(1) == own).mean() > 0.97
    fresh, right = groups(4, 25, seed=2, spread=1.0)
    assert (gate(fresh).argmax(1) == right).mean() > 0.97


def test_what_the_gate_says_of_a_row_is_what_it_says_without_it():
    """The closed form is the fit on all other rows."""
    points, own = groups(3, 6, spread=4.0)
    targets = np.eye(3)[np.random.default_rng(3).permutation(own)]
    gate = TextGate.fit(points, targets)
    for row in (0, 7):
        rest = np.arange(len(own)) != row
        kernel = np.linalg.eigvalsh((points - points.mean(0)) @ (points - points.mean(0)).T).mean()
        best = min(
            np.abs(alone(points, targets, rest, row, ridge * kernel) - gate.held_out[row]).max()
            for ridge in (0.03, 0.1, 0.3, 1.0, 3.0)
        )
        assert best < 1e-9


def alone(points, targets, rest, row, ridge):
    """Ridge regression with an intercept, on some rows, asked about one other."""
    from router_training.clusters import probabilities

    mean, offset = points[rest].mean(0), targets[rest].mean(0)
    x = points[rest] - mean
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ (targets[rest] - offset))
    return probabilities(((points[row] - mean) @ weights + offset)[None])[0]


@pytest.mark.parametrize("most", [40, 2000])
def test_likelihood_and_text_make_up_for_each_others_errors(most):
    """A third of the likelihoods point nowhere; the text makes up for most of them."""
    points, own = groups(4, 30, spread=2.0)
    rng = np.random.default_rng(0)
    logits = 6.0 * np.eye(4)[own] + rng.normal(size=(len(own), 4))
    blind = rng.random(len(own)) < 0.33
    logits[blind] = rng.normal(size=(int(blind.sum()), 4))
    chances, gate = agreed(logits, points, 0.01, most=most)
    assert (logits.argmax(1) == own).mean() < 0.85
    assert (chances.argmax(1) == own).mean() > 0.92
    assert (gate(points).argmax(1) == own).mean() > 0.92


@given(st.integers(0, 1000), st.floats(0.0, 2.0, allow_subnormal=False))
@settings(max_examples=40, deadline=None)
def test_balance_evens_out_and_keeps_probabilities(seed, balance):
    """Rows still sum to one, and the largest share is not larger than without."""
    logits = np.random.default_rng(seed).normal((1.5, 0, 0, -1), size=(30, 4))
    plain, even = softmax(logits), balanced(logits, balance)
    assert np.allclose(even.sum(1), 1)
    assert even.mean(0).max() <= plain.mean(0).max() + 1e-9


TWO_OF_ONE_TASK = np.array([[0.15, 2, 0.2, 2], [2, 0.1, 2, 2], [0.2, 2, 0.1, 2], [2, 2, 2, 0.1]])[
    np.repeat([0, 1, 2, 3], (4, 5, 5, 5))
]
OWN = np.repeat([0, 1, 2, 3], (4, 5, 5, 5))


def test_adapters_that_serve_each_others_rows_are_joined():
    """Clusters 0 and 2 are one task: adapter 2 serves both best; the others stay."""
    assert merge_cheapest(TWO_OF_ONE_TASK, OWN, 3) == [2, 1, 3]
    assert merge_cheapest(TWO_OF_ONE_TASK, OWN, 4) == [0, 1, 2, 3]


def test_of_two_adapters_that_are_the_same_the_smaller_goes():
    """And one without rows; where none are the same, all stay."""
    assert distinct(TWO_OF_ONE_TASK, OWN, same=0.1) == [1, 2, 3]
    assert distinct(TWO_OF_ONE_TASK, OWN, same=0.01) == [0, 1, 2, 3]
    idle = np.pad(TWO_OF_ONE_TASK, ((0, 0), (0, 1)), constant_values=0.0)
    assert distinct(idle, OWN, same=0.01) == [0, 1, 2, 3]


def test_adapters_of_few_rows_go_where_many_are_asked_for():
    """Three rows, two and one, each with an adapter that is nobody's double."""
    labels = np.array([0, 0, 0, 1, 1, 2])
    losses = np.where(np.eye(3)[labels] > 0, 0.1, 3.0)
    for least, left in ((1, [0, 1, 2]), (2, [0, 1]), (3, [0]), (4, [])):
        assert distinct(losses, labels, same=0.01, least=least) == left


def test_an_adapter_that_knows_a_second_task_is_not_the_second_tasks():
    """Adapter 0 serves all rows, adapter 1 only its own: both stay."""
    losses = np.array([[0.1, 3.0, 3.0], [0.1, 0.1, 3.0], [3.0, 3.0, 0.1]])
    assert distinct(losses, np.array([0, 1, 2]), same=0.1) == [0, 1, 2]


def test_a_cluster_without_rows_is_the_first_to_be_joined():
    """It costs nothing."""
    losses = np.array([[0.1, 2.0, 1.0], [2.0, 0.1, 1.0]])
    assert merge_cheapest(losses, np.array([0, 1]), 2) == [0, 1]
