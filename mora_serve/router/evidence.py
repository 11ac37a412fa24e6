"""What speaks for each candidate: the inputs of the gates.

The best candidate is judged by how near the prompt is to one of its prototypes. Every other one is
judged by the rest of the prompt, once the words that the best one's examples use are taken out:
by what it scores there, and by its lead over whoever competes for that place. Two adapters that
one prompt asks for share its direction, so that each scores lower than it would alone, but the
rest is the second one's alone; a candidate that is merely like the best one has nothing there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from mora_serve.router.arrays import Floats
from mora_serve.router.index import FOUND, Index
from mora_serve.router.router import Router
from mora_serve.router.rows import Objects, Rows


@dataclass(frozen=True, eq=False)
class Evidence:
    """n candidates, best score first.

    ``score`` [n]: the mean of the cosines with the centre and with the nearest prototype,
    weighted by the calibration's ``blend``. ``first`` [1]: the best one's cosine with its nearest
    prototype. ``further`` [n - 1, 2]: what the others score by the rest of the prompt, and their
    leads there.
    """

    names: Objects
    groups: Objects
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
) -> Evidence | None:
    """What a prompt says for the tenant's adapters, or for those of ``names``.

    ``pooled`` is the prompt's state where the router is on hidden states. None where there is
    no candidate. Raises what ``Router.embed`` raises.
    """
    z = router.embed(text, pooled)
    rows = index.candidates(tenant, z, names)
    if rows is None:
        return None
    blend = router.calibration.blend
    score = _blended(rows, z, blend)
    best = int(np.lexsort((rows.names.astype(str), -score))[0])
    first = rows.take(np.array([best]))
    taken = first.prototypes[0] * first.scales[0, 1:, None]
    left = router.rest(text, z, first.words[0], taken)
    if left.any() and len(score) == FOUND:  # others than these may be near what is left
        rows = _joined(rows, index.candidates(tenant, left, names))
        score = _blended(rows, z, blend)
    again = _blended(rows, left, blend)
    later = np.arange(len(score)) != best
    order = np.lexsort((rows.names.astype(str), -score, -again, later))
    rest = again[order[1:]]
    rival = np.full(len(rest), rest[0] if len(rest) else 0, np.float32)
    rival[:1] = rest[1] if len(rest) > 1 else 0
    return Evidence(
        rows.names[order],
        rows.groups[order],
        score[order],
        first.nearest(z),
        np.column_stack((rest, rest - rival)),
    )


def _joined(rows: Rows, more: Rows | None) -> Rows:
    if more is None:
        return rows
    present = set(rows.names)
    new = [i for i, name in enumerate(more.names) if name not in present]
    return Rows.join((rows, more.take(np.array(new, np.intp))))


def _blended(rows: Rows, z: Floats, blend: float) -> Floats:
    scores: Floats = (1 - blend) * rows.cosines(z) + blend * rows.nearest(z)
    return scores
