"""Faults in a real engine: its own forward, which raises or hangs for the batches a test names.

And captures of graphs that raise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mora_serve.engine.engine import Engine
from mora_serve.engine.graphs import Work
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


class FaultyCapture:
    """A capture for any device, whose graphs are the work itself; ``replayed`` counts.

    It raises ``error``, after the work or with ``broken_off`` before it, whenever ``faulty`` says
    so of how many it was asked for, this one counted.
    """

    def __init__(
        self,
        error: Exception,
        faulty: Callable[[int], bool] = lambda asked: True,
        *,
        broken_off: bool = False,
    ) -> None:
        self.error, self.faulty, self.asked = error, faulty, 0
        self.broken_off, self.replayed = broken_off, 0

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def __call__(self, work: Work) -> Work:
        self.asked += 1
        if self.faulty(self.asked):
            if not self.broken_off:
                work()
            raise self.error

        def replay() -> None:
            self.replayed += 1
            work()

        return replay
