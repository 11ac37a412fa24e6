"""What a forward reads of a batch, as plain numbers: it can be sent to another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from mora_serve.engine.scheduler import Chunk

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Several tokens of one sequence after ``start`` others; ``pages`` hold all up to its end."""

    start: int
    length: int
    pages: IntArray


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A step of T tokens: single tokens first, then longer chunks.

    ``tokens``, ``positions`` and ``places`` (page * page_size + offset) [T]; ``last`` [n] the rows
    whose logits are wanted. Of the single tokens, ``table`` [singles, pages] their page tables,
    padded with page 0, and ``contexts`` [singles] the tokens up to theirs. Of each chunk, single or
    not, ``lengths`` its tokens and ``mixtures`` its (slot, weight) pairs.
    """

    tokens: IntArray
    positions: IntArray
    places: IntArray
    last: IntArray
    table: IntArray
    contexts: IntArray
    prefills: tuple[PromptChunk, ...]
    lengths: tuple[int, ...]
    mixtures: tuple[tuple[tuple[int, float], ...], ...]

    @classmethod
    def of(cls, batch: Sequence[Chunk], slot: Callable[[str], int], page_size: int) -> Self:
        """Of a batch whose single tokens come first; ``slot`` gives an adapter's slot by digest."""
        tokens: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        last: list[int] = []
        for chunk in batch:
            span = range(chunk.start, chunk.start + chunk.length)
            tokens += chunk.sequence.tokens[chunk.start : span.stop]
            positions += span
            pages = chunk.sequence.pages
            places += [pages[p // page_size] * page_size + p % page_size for p in span]
            if chunk.samples:
                last.append(len(tokens) - 1)
        singles = [c for c in batch if c.length == 1]
        width = max((-(-(c.start + 1) // page_size) for c in singles), default=0)
        table = np.zeros((len(singles), width), np.int64)
        for row, chunk in zip(table, singles, strict=True):
            used = chunk.sequence.pages[:width]
            row[: len(used)] = used
        prefills = [
            PromptChunk(
                c.start,
                c.length,
                _array(c.sequence.pages[: -(-(c.start + c.length) // page_size)]),
            )
            for c in batch[len(singles) :]
        ]
        return cls(
            tokens=_array(tokens),
            positions=_array(positions),
            places=_array(places),
            last=_array(last),
            table=table,
            contexts=_array([c.start + 1 for c in singles]),
            prefills=tuple(prefills),
            lengths=tuple(c.length for c in batch),
            mixtures=tuple(tuple((slot(d), w) for d, w in c.sequence.weights) for c in batch),
        )


def _array(values: Sequence[int]) -> IntArray:
    return np.array(values, np.int64)
