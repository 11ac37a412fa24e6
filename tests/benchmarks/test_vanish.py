"""Who vanishes, and how."""

from __future__ import annotations

import random
from collections import Counter

from benchmarks.vanish import KINDS, LONG, SHORT, draw


def test_three_in_ten_vanish_in_equal_parts() -> None:
    jobs = draw(500, random.Random(0))
    kinds = Counter(job.kind for job in jobs)
    assert kinds == {"": 350, **dict.fromkeys(KINDS, 50)}
    assert {job.options["max_tokens"] for job in jobs if not job.kind} == {SHORT}
    assert {job.options["max_tokens"] for job in jobs if job.kind} == {LONG}


def test_the_same_seed_asks_the_same() -> None:
    """Both runs of a measurement, and any other, make the same requests."""
    assert draw(50, random.Random(3)) == draw(50, random.Random(3))
    assert draw(50, random.Random(3)) != draw(50, random.Random(4))
