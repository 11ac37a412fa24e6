"""What a name means to a tenant, and what whoever asks for another one is told."""

from __future__ import annotations

import bisect
import difflib
import heapq
from collections.abc import Iterable

from mora_serve.adapters.record import AdapterRecord, State
from mora_serve.adapters.untrusted import quoted
from mora_serve.core import SHARED_TENANT
from mora_serve.errors import NotFound, PermissionDenied

# Comparing two names takes a fifth of a millisecond, and others wait meanwhile: of very many names
# only the neighbours are looked at, and compared are those that begin and end most like the one
# asked for.
_LOOKED_AT, _COMPARED, _CHARACTERS = 1000, 20, 64


def own(state: State, tenant: str, name: str) -> AdapterRecord:
    """The tenant's own adapter of a name, to be changed.

    Raises NotFound, and PermissionDenied where the name is that of a shared one.
    """
    record = state.adapters.get((tenant, name))
    if record is not None:
        return record
    if state.find(tenant, name) is not None:
        raise PermissionDenied(
            f"adapter: {quoted(name)} is shared; only tenant {SHARED_TENANT!r} can change it, "
            "register one of your own under another name",
            field="adapter",
            reason="SHARED_ADAPTER",
        )
    raise unknown("adapter", name, (r.name for r in state.visible(tenant)))


def unknown(kind: str, name: str, known: Iterable[str]) -> NotFound:
    """An adapter or a task that is not among the ``known`` ones; it names the nearest of those."""
    near = nearest(name, known)
    remedy = f"did you mean {', '.join(near)}?" if near else f"list the known {kind}s"
    return NotFound(
        f"{kind}: {quoted(name)} is not registered; {remedy}",
        field=kind,
        reason=f"{kind.upper()}_NOT_FOUND",
    )


def gone(digest: str) -> NotFound:
    """A content that is not stored."""
    return NotFound(
        f"digest: the content {quoted(digest)} is not stored (any more); register the adapter "
        "again, or use its present version",
        field="digest",
        reason="VERSION_NOT_FOUND",
    )


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three names like this one, the most alike first, in a time that has a bound."""
    name = name[:_CHARACTERS]
    backwards = name[::-1]

    def unlikeness(other: str) -> tuple[int, int]:
        same = _begins_alike(name, other) + _begins_alike(backwards, other[::-1])
        return -same, abs(len(other) - len(name))

    names = sorted(known)
    here = bisect.bisect(names, name)
    start = max(0, min(here - _LOOKED_AT // 2, len(names) - _LOOKED_AT))
    likely = heapq.nsmallest(_COMPARED, names[start : start + _LOOKED_AT], key=unlikeness)
    return difflib.get_close_matches(name, likely, 3)


def _begins_alike(a: str, b: str) -> int:
    """How many characters two names have in common from the start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
