"""What speaks for each candidate: the inputs of the gates.

The best candidate is judged by how near the prompt is to one of its prototypes. Every other one is
judged by the rest of the prompt, once the words that the best one's examples use are taken out:
by what it scores there, and by its lead over whoever competes for that place. Two adapters that
one prompt asks for share its direction, so that each scores lower than it would alone, but the
rest is the second one's alone; a candidate that is merely like the best one has nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Set
from dataclasses import dataclass

import numpy as np

from mora_serve.router.arrays import Floats
from mora_serve.router.index import FOUND, Candidates, Index
from mora_serve.router.router import Router, beside


@dataclass(frozen=True, eq=False)
class Evidence:
    """n candidates, best score first.

    ``score`` [n]: the mean of the cosines with the centre and with the nearest prototype,
    weighted by the calibration's ``blend``. ``first`` [1]: the best one's cosine with its nearest
    prototype. ``further`` [n - 1, 2]: what the others score by the rest of the prompt, and their
    leads there.
    """

    names: list[str]
    groups: list[str]
    score: Floats
    first: Floats
    further: Floats


def gather(
    router: Router,
    index: Index,
    tenant: str,
    text: str,
    pooled: Floats | None = None,
    names: Collection[str] | None = None,
    hidden: Set[str] = frozenset(),
) -> Evidence | None:
    """What a prompt says for adapters that the tenant may use, or for those of ``names``.

    ``hidden`` are names of shared adapters that the tenant has given to its own.

    ``pooled`` is the prompt's state where the router is on hidden states. None where there is
    no candidate. Raises what ``Router.embed`` raises.
    """
    z = router.embed(text, pooled)
    found = index.candidates(tenant, z, names, hidden=hidden)
    if found is None:
        return None
    blend = router.calibration.blend
    score, nearest = _scores(found, z, blend)
    best = min(zip((-score).tolist(), found.names, range(len(score)), strict=True))[-1]
    first = nearest[best : best + 1]
    if router.reads_words:
        left = router.rest(text, found.words(best))
    else:
        left = beside(z, found.prototypes(best))
    if len(score) == FOUND and left.any():  # others than these may be near what is left
        name = found.names[best]
        found = found.joined(index.candidates(tenant, left, names, hidden=hidden))
        best = found.names.index(name)
        score, _ = _scores(found, z, blend)
    again, _ = _scores(found, left, blend)
    listed, groups = found.names, found.groups
    keys = list(zip((-again).tolist(), (-score).tolist(), listed, strict=True))
    keys[best] = (-math.inf, 0.0, "")
    order = sorted(range(len(keys)), key=keys.__getitem__)
    rest = again[order[1:]]
    rival = np.full(len(rest), rest[0] if len(rest) else 0, np.float32)
    rival[:1] = rest[1] if len(rest) > 1 else 0
    return Evidence(
        [listed[i] for i in order],
        [groups[i] for i in order],
        score[order],
        first,
        np.stack((rest, rest - rival), axis=1),
    )


def _scores(found: Candidates, z: Floats, blend: float) -> tuple[Floats, Floats]:
    """Each one's blended score [n], and its cosine with the nearest prototype [n]."""
    cosines, nearest = found.scores(z)
    return (1 - blend) * cosines + blend * nearest, nearest
