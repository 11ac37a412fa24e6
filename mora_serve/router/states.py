"""The base's hidden states, as routing asks for them; whoever runs the base answers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from mora_serve.router.arrays import Floats
from mora_serve.router.features import PooledHidden


class States(Protocol):
    """What routing needs of a base. Both are safe to call from any thread."""

    def check(self, hidden: PooledHidden) -> None:
        """Raise FailedPrecondition where this base has no such state."""

    def submit(
        self,
        texts: Sequence[str],
        hidden: PooledHidden,
        *,
        background: bool = False,
        tenant: str = "",
    ) -> Future[Floats]:
        """The states [texts, hidden.dim] of texts, in a while; in the ``background`` later.

        Tenants take turns.

        Raises, at once or by the future, Unavailable where the base stops, ResourceExhausted
        where too many wait, and Internal.
        """


@dataclass(frozen=True, eq=False)
class Asked:
    """A state [1, dim] under way: whose, and which."""

    text: str
    hidden: PooledHidden
    states: Future[Floats]


@dataclass(frozen=True, eq=False)
class State:
    """The state [dim] of a text to route."""

    text: str
    hidden: PooledHidden
    pooled: Floats
