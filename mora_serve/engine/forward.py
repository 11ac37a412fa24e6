"""What the runner asks of a step's forward, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mora_serve.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits of the chunks that sample, in the batch's order.

    ``best`` is the greatest of each row, the first where several are; ``finite`` whether all of a
    row are finite numbers. For the rows in ``drawn``, ``best`` is the token that the request's own
    temperature and seed draw (see sampler.draws_plainly). ``read`` gives rows of logits by index,
    [n, vocabulary] float32, good until the next step.
    """

    read: Callable[[Sequence[int]], Tensor]
    best: list[int]
    finite: list[bool]
    drawn: Collection[int] = ()

    @classmethod
    def of(cls, values: Tensor, best: list[int], finite: list[bool]) -> Logits:
        """From all rows side by side, nothing drawn."""

        def read(rows: Sequence[int]) -> Tensor:
            return values if len(rows) == len(values) else values[list(rows)]

        return cls(read, best, finite)

    @property
    def values(self) -> Tensor:
        """All of them."""
        return self.read(range(len(self.best)))


class Follower(Protocol):
    """Another rank's part of steps that rank 0 lays out."""

    def prepare(self) -> None:
        """As Forward's, together with rank 0's."""
        ...

    def follow(self, inputs: Any) -> None:
        """Compute a step."""
        ...


class Forward(Protocol):
    """One forward for the whole batch; writes the keys and values of all its tokens."""

    @property
    def reads_whole_pages(self) -> bool:
        """It reads and masks what is beyond a sequence's end: pages must hold finite numbers."""
        ...

    @property
    def torch_threads(self) -> int:
        """How many threads torch may use beside it on a CPU; 0 leaves that as it is."""
        ...

    def prepare(self) -> None:
        """What would make the first steps slow, done before them."""
        ...

    def __call__(self, batch: Sequence[Chunk], slot: Callable[[str], int]) -> Logits | None:
        """None when no chunk samples; ``slot`` gives an adapter's slot by digest."""
        ...
