"""The resident base's hidden states for the router: its engine computes them between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from mora_serve.errors import FailedPrecondition
from mora_serve.router.arrays import Floats
from mora_serve.router.features import PooledHidden

if TYPE_CHECKING:
    from mora_serve.server.parts import ServedEngine


class EngineStates:
    """See ``mora_serve.router.states.States``."""

    def __init__(self, engine: ServedEngine) -> None:
        self._engine = engine

    def check(self, hidden: PooledHidden) -> None:
        """Raise FailedPrecondition, naming what does not fit, for states of another base."""
        shape = self._engine.base.shape
        for has, most, what in (
            (hidden.depth, shape.layers, "layers"),
            (hidden.max_tokens, shape.max_positions, "positions"),
        ):
            if has > most:
                raise _wrong_base(f"it needs {has} {what} of the base, this one has {most}")
        if hidden.dim != shape.hidden_size:
            raise _wrong_base(
                f"it was fitted on states of {hidden.dim} numbers, this base's have "
                f"{shape.hidden_size}"
            )

    def submit(
        self,
        texts: Sequence[str],
        hidden: PooledHidden,
        *,
        background: bool = False,
        tenant: str = "",
    ) -> Future[Floats]:
        """The states [texts, hidden.dim]; raises what ``Engine.pooled_hidden`` raises."""
        return self._engine.pooled_hidden(
            texts, hidden.depth, hidden.max_tokens, background=background, tenant=tenant
        )


def _wrong_base(message: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"router: {message}; load a router fitted for this base",
        field="router.features",
        reason="WRONG_BASE",
    )
