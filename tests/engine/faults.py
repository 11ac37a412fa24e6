"""Faults in a real engine: its own forward, which raises or hangs for the batches a test names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mora_serve.engine.engine import Engine
from mora_serve.engine.scheduler import Chunk


class FaultyForward:
    """Takes the place of an engine's forward, which runs as ever.

    ``before`` and ``after`` are called with each batch; what they raise is the forward's fault.
    """

    def __init__(
        self,
        engine: Engine,
        before: Callable[[Sequence[Chunk]], object] = lambda batch: None,
        after: Callable[[Sequence[Chunk]], object] = lambda batch: None,
    ) -> None:
        self.sizes: list[int] = []  # tokens of each batch
        self.before, self.after = before, after
        self._forward = engine.runner.forward
        engine.runner.forward = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward, name)

    def __call__(self, batch: Sequence[Chunk], slot: Callable[[str], int]) -> Any:
        self.sizes.append(sum(c.length for c in batch))
        self.before(batch)
        logits = self._forward(batch, slot)
        self.after(batch)
        return logits


def raises_for(*ids: str, after: int = 0, error: Exception | None = None) -> Callable[..., None]:
    """A fault of some requests, once they have ``after`` tokens."""

    def fault(batch: Sequence[Chunk]) -> None:
        for chunk in batch:
            sequence = chunk.sequence
            if sequence.request.id in ids and len(sequence.output) >= after:
                raise error or RuntimeError("an injected fault at /secret/path")

    return fault
