"""A few directions that stand for the example prompts of one adapter."""

from __future__ import annotations

import numpy as np

from mora_serve.router.arrays import Floats, unit

ROUNDS = 10


def prototypes(embedded: Floats, count: int) -> Floats:
    """``count`` unit vectors for unit vectors [n, K]: spherical k-means.

    Of fewer than ``count`` the last one is repeated.

    It starts from the prompt farthest from the mean and goes on with the one farthest from
    those taken. The outcome depends on the rows and their order alone: no randomness, no BLAS.
    """
    if len(embedded) <= count:
        return embedded[np.minimum(np.arange(count), len(embedded) - 1)]
    if count == 1:
        return unit(embedded.sum(0, keepdims=True))
    like = np.einsum("ik,jk->ij", embedded, embedded)
    taken = [int(like.sum(1).argmin())]
    while len(taken) < count:
        taken.append(int(like[:, taken].max(1).argmin()))
    found = embedded[taken]
    for _ in range(ROUNDS):
        nearest = np.einsum("ik,jk->ij", embedded, found).argmax(1)
        sums = [embedded[nearest == j].sum(0) for j in range(count)]
        moved = unit(np.stack([s if s.any() else f for s, f in zip(sums, found, strict=True)]))
        if (moved == found).all():
            break
        found = moved
    return found
