"""The router's keys as points of a plane, for people to look at.

The plane is that of the two principal axes of the keys' centres. It shows which adapters are alike;
decisions are made in all dimensions.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import numpy as np

from mora_serve.router.arrays import Floats
from mora_serve.router.index import Index

MOST = 512  # adapters that are drawn


@dataclass(frozen=True, eq=False)
class KeyMap:
    """``names`` of n adapters, their centres' ``points`` [n, 2], their examples' ``prototypes``.

    Each adapter's prototypes are [P, 2]. ``share`` is the part of the centres' variance that the
    two axes show. ``text`` [2] is where the text in question lies, None where there was none.
    """

    names: list[str]
    points: Floats
    prototypes: list[Floats]
    share: float
    text: Floats | None = None


def draw(
    index: Index, tenant: str, dims: int, z: Floats | None = None, hidden: Set[str] = frozenset()
) -> KeyMap:
    """The adapters that a tenant's prompts are routed to; of very many those nearest to z [dims].

    ``hidden`` is as ``Index.candidates`` has it.
    """
    anywhere = np.zeros(dims, np.float32)
    found = index.candidates(tenant, anywhere if z is None else z, None, MOST, hidden)
    if found is None:
        nothing = np.zeros((0, 2), np.float32)
        return KeyMap([], nothing, [], 0.0, None if z is None else anywhere[:2])
    centres, names = found.centres, found.names
    middle = centres.mean(0)
    _, sizes, rows = np.linalg.svd(centres - middle, full_matrices=False)
    axes = np.zeros((2, dims), np.float32)
    axes[: len(rows)] = rows[:2]
    # Axes have no sign of their own: the same keys are to give the same picture.
    axes *= np.where(axes[np.arange(2), np.abs(axes).argmax(1)] < 0, -1, 1)[:, None]
    variance = float((sizes**2).sum())
    return KeyMap(
        names,
        (centres - middle) @ axes.T,
        [(found.prototypes(i) - middle) @ axes.T for i in range(len(names))],
        float((sizes[:2] ** 2).sum()) / variance if variance else 0.0,
        None if z is None else (z - middle) @ axes.T,
    )
