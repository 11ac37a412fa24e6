"""Whitening: what its parts compute."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import shrunk_covariance

from router_training.whitening import Whitening


@pytest.mark.parametrize("rows", [6, 40])
def test_whitening_inverts_the_ridged_within_adapter_covariance(rows: int) -> None:
    """With fewer prompts than features and with more."""
    rng = np.random.default_rng(0)
    adapters = [rng.normal(size=(rows, 20)) @ rng.normal(size=(20, 20)) for _ in range(3)]
    whitening = Whitening.of(adapters)
    matrix = whitening.matrix(0.3, 20, 0)
    spread = np.concatenate([a - a.mean(0) for a in adapters])
    covariance = spread.T @ spread / len(spread)
    ridged = covariance + 0.3 * np.trace(covariance) / 20 * np.eye(20)
    assert np.allclose(1.3 * shrunk_covariance(covariance, shrinkage=0.3 / 1.3), ridged)
    assert np.allclose(matrix @ matrix.T @ ridged, np.eye(20), atol=1e-6)
    assert np.allclose(whitening.mean, np.concatenate(adapters).mean(0))


def test_what_other_prompts_vary_in_is_shrunk_too() -> None:
    rng = np.random.default_rng(0)
    adapters = [rng.normal(size=(30, 20)) + rng.normal(size=20) for _ in range(3)]
    axis = rng.normal(size=20)
    others = rng.normal(size=(30, 1)) * 10 * axis + 5  # their mean is no part of it
    plain = np.linalg.norm(axis @ Whitening.of(adapters).matrix(0.1, 20, 0))
    shrunk = np.linalg.norm(axis @ Whitening.of(adapters, [others]).matrix(0.1, 20, 0))
    assert shrunk < 0.2 * plain
    assert np.allclose(Whitening.of(adapters, [others]).mean, np.concatenate(adapters).mean(0))


def test_the_projection_keeps_known_means_and_leaves_other_inner_products_unbiased() -> None:
    rng = np.random.default_rng(0)
    adapters = [rng.normal(size=(30, 200)) + rng.normal(size=200) for _ in range(4)]
    whitening = Whitening.of(adapters)
    full = whitening.matrix(1.0, 200, 0)
    centred = (whitening.means - whitening.mean) @ full
    probe = rng.normal(size=200) @ full
    exact = probe @ probe
    found = []
    for seed in range(200):
        part = whitening.matrix(1.0, 40, seed)
        kept = (whitening.means - whitening.mean) @ part
        assert np.allclose(kept @ kept.T, centred @ centred.T)
        found.append(np.square(np.linalg.solve(full.T, probe) @ part).sum())
    assert np.mean(found) == pytest.approx(exact, rel=0.05)
