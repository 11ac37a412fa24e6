"""Limited places that tenants share: how many one may hold, and when the refused may come back."""

from __future__ import annotations

import math
import random

SHARE = 0.5  # of the places that others leave

LEAST_RETRY, MOST_RETRY = 0.1, 60.0  # seconds
SPREAD = 0.5  # of the wait: over how long the refused come back


def most(places: int, others: int, share: float = SHARE) -> int:
    """How many of ``places`` one tenant may hold while other tenants hold ``others``.

    A share of those that the others leave, so that there is room for whoever comes next; at least
    one where any is left. Two that want everything have a third each where the share is a half.
    """
    left = max(0, places - others)
    return min(left, max(1, math.ceil(share * left)))


def retry_after(wait: float | None, rng: random.Random) -> float:
    """Seconds after which to try again where the wait is expected to be ``wait`` (None: unknown).

    Never sooner, within bounds, and spread: those refused together do not return together.
    """
    base = 1.0 if wait is None else min(MOST_RETRY, max(LEAST_RETRY, wait))
    return base * (1 + SPREAD * rng.random())
