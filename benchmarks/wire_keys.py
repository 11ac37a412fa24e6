"""The keys of the calls that ``fuzz_wire`` makes: most are whole, and what the others have to get.

A key depends on nothing but the seed, as the cases do.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.keys import OVER, add_key, bearer
from mora_serve.access.door import HEALTH
from mora_serve.access.door import TENANT as NAMED
from mora_serve.access.keys import PREFIX
from mora_serve.access.roles import ALLOWED, Role

TENANT = "fuzz"  # whose calls the cases are
KEEPER = "keeper"  # a tenant that no case has
# Kinds of keys, and how often of a hundred a case has one.
WHOLE, GENERATE, ENDED, NEVER, NONE, ODD = "whole", "generate", "ended", "never", "none", "odd"
OFTEN = {WHOLE: 85, GENERATE: 5, ENDED: 2, NEVER: 2, NONE: 3, ODD: 3}

Pairs = Sequence[tuple[str, str | bytes]]


def secret(seed: int, kind: str) -> str:
    """The key of this kind, or of the keeper."""
    return PREFIX + hashlib.sha256(f"{seed} {kind}".encode()).hexdigest()[:43]


def write(file: Path, seed: int) -> None:
    """The access file of the server that the cases are for."""
    for kind in (WHOLE, GENERATE, ENDED):
        roles = [Role.GENERATE] if kind == GENERATE else [*Role]
        more = OVER if kind == ENDED else ""
        add_key(file, kind, TENANT, roles, more, secret(seed, kind))
    add_key(file, KEEPER, KEEPER, secret=secret(seed, KEEPER))


def draw(rng: random.Random, seed: int) -> tuple[str, Pairs]:
    """A kind of key, and the metadata with it."""
    kind = rng.choices([*OFTEN], [*OFTEN.values()])[0]
    if kind == NONE:
        return kind, ()
    if kind != ODD:
        return kind, bearer(secret(seed, kind))
    right = secret(seed, WHOLE)
    odd = (
        *("Bearer x", "Bearer", "", "Basic Og==", "Bearer " + "k" * 2000, "bearer  x"),
        *(right, f"Basic {right}", f"Bearer {right[:-1]}", f"Bearer {right}, {right}"),
        f"Bearer {right.upper()}",
    )
    return kind, (("authorization", rng.choice(odd)),)


def refusal(kind: str, path: str, metadata: Pairs) -> str:
    """The code that a call has to get for its key alone; empty where it may get past."""
    if not kind or path.startswith(HEALTH):
        return ""
    if kind not in (WHOLE, GENERATE):
        return "UNAUTHENTICATED"
    roles = set(Role) if kind == WHOLE else {Role.GENERATE}
    named = dict(metadata).get(NAMED, TENANT)
    if not roles & ALLOWED.get(path, frozenset()) or str(named).strip() != TENANT:
        return "PERMISSION_DENIED"
    return ""
