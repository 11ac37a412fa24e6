"""What the runner asks of a step's forward, whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mora_serve.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits of the chunks that sample, in the batch's order.

    ``values`` [n, vocabulary] float32, good until the next step; ``best`` the greatest of each
    row, the first where several are; ``finite`` whether all of a row are finite numbers.
    """

    values: Tensor
    best: list[int]
    finite: list[bool]


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

    def __call__(self, batch: Sequence[Chunk], slot: Callable[[str], int]) -> Logits | None:
        """None when no chunk samples; ``slot`` gives an adapter's slot by digest."""
        ...
