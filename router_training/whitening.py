"""Whitening: what prompts of one adapter differ in is shrunk, and the rest projected.

With the mean μ of the features φ of labelled prompts and the covariance Σ of what does not tell
adapters apart, LLᵀ = Σ + λ (tr Σ / D) I and z = L⁻¹ (φ - μ). Σ is pooled from the prompts of each
adapter around their mean and from other sets of prompts around theirs (those of no adapter, those
of several): the words that such prompts share with an adapter's say nothing.

z is projected to K dimensions: those that the known adapters' means span are kept as they are,
the rest, where adapters to come will lie, by random directions so scaled that inner products keep
their expectation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Whitening:
    """Mean [D] and covariance [D, D] of features, and the adapters' means [n, D]."""

    mean: Array
    means: Array
    covariance: Array

    @classmethod
    def of(cls, adapters: Sequence[Array], others: Sequence[Array] = ()) -> Whitening:
        """From the features [m, D] of each adapter's prompts, and of other sets of prompts."""
        spread = np.concatenate([rows - rows.mean(0) for rows in (*adapters, *others)])
        return cls(
            np.concatenate(adapters).mean(0),
            np.stack([rows.mean(0) for rows in adapters]),
            spread.T @ spread / len(spread),
        )

    def matrix(self, strength: float, dims: int, seed: int) -> Array:
        """[D, dims], or [D, D] where dims is more: z = (φ - mean) @ matrix; λ is ``strength``."""
        size = len(self.mean)
        ridge = strength * max(float(np.trace(self.covariance)) / size, 1e-9)
        ridged = torch.from_numpy(self.covariance) + ridge * torch.eye(size)
        lower = torch.linalg.cholesky(ridged)
        means = torch.from_numpy((self.means - self.mean).T)
        whitened = torch.linalg.solve_triangular(lower, means, upper=False).numpy()
        columns = torch.from_numpy(_directions(whitened, dims, seed))
        out: Array = torch.linalg.solve_triangular(lower.T, columns, upper=True).numpy()
        return out


def _directions(means: Array, dims: int, seed: int) -> Array:
    """[D, dims] to project whitened features by; ``means`` [D, n]."""
    size = len(means)
    if dims >= size:
        return np.eye(size, dtype=means.dtype)
    axes, _, _ = np.linalg.svd(means, full_matrices=False)
    kept = axes[:, : min(means.shape[1] - 1, dims // 2)]
    drawn = np.random.default_rng(seed).normal(size=(size, dims - kept.shape[1]))
    random = drawn.astype(means.dtype)
    random, _ = np.linalg.qr(random - kept @ (kept.T @ random))
    scale = math.sqrt((size - kept.shape[1]) / random.shape[1])
    return np.concatenate([kept, random * np.asarray(scale, means.dtype)], 1)
