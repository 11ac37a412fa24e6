"""The router's space in two dimensions: where keys and prompts lie to each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from router_training.evaluation.cases import Case, by_adapter
from router_training.evaluation.metrics import Array
from router_training.evaluation.scored import RouterScorer

PROMPTS = 14  # of each adapter
NOBODY = 40  # prompts of no adapter, of each kind


def key_map(
    scorer: RouterScorer,
    cases: Sequence[Case],
    near: Sequence[Case] = (),
    far: Sequence[Case] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Keys and prompts laid out in a plane so that their distances are kept as well as can be.

    Metric scaling (SMACOF) of the angles' chords, √(2 - 2 cos), from the principal axes. ``stress``
    is what is lost: Kruskal's, 0 for a perfect map. Of each adapter some prompts are shown.
    """
    names = list(scorer.keys)
    groups = {name: at[:PROMPTS] for (name, *_), at in by_adapter(cases).items() if name in names}
    shown = [cases[i].prompt for at in groups.values() for i in at]
    nobody = [c.prompt for kind in (near, far) for c in kind[:NOBODY]]
    keys = [scorer.keys[name].centre for name in names]
    vectors = np.stack([*keys, *scorer.embedded([*shown, *nobody])]).astype(np.float64)
    points, stress = _scaled(vectors, seed)
    at = iter(points[len(names) :].tolist())
    return {
        "stress": round(stress, 4),
        "keys": dict(zip(names, points[: len(names)].tolist(), strict=True)),
        "prompts": {name: [next(at) for _ in rows] for name, rows in groups.items()},
        "near": [next(at) for _ in near[:NOBODY]],
        "far": [next(at) for _ in far[:NOBODY]],
    }


def _scaled(vectors: Array, seed: int) -> tuple[Array, float]:
    from sklearn.manifold import smacof

    chords = np.sqrt(np.clip(2 - 2 * vectors @ vectors.T, 0, None))
    np.fill_diagonal(chords, 0)
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    start = centred @ axes[:2].T
    points, stress = smacof(
        chords,
        n_components=2,
        init=start,
        n_init=1,
        random_state=seed,
        normalized_stress=True,
    )
    return np.round(points, 4), float(stress)
