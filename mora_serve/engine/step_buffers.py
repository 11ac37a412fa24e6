"""What a step of kernels reads: tokens, positions, pages, sampling, in memory that does not move.

``StepBuffers`` is the memory. ``DecodeRows`` fills it for steps of single tokens, from what the
step before left there: a sequence keeps its row while it decodes, and of its page table only new
pages are written. While a step runs, the next one of the same sequences is laid out already.
``fill_prompts`` fills it anew, for steps with prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mora_serve.engine.sampler import draws_plainly, signed
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence
from mora_serve.model.packed import Packed

Ints = npt.NDArray[np.int64]
Mixtures = list[tuple[tuple[int, float], ...]]


class StepBuffers:
    """Room for ``tokens`` tokens of ``chunks`` chunks, each with up to ``pages`` pages.

    Of each token: ``tokens``, ``positions``, ``places`` (page * page_size + offset, -1 for none),
    int32. Of each chunk: ``lengths``, its tokens with the ``contexts`` before them; ``starts``, its
    first row, and ``counts``, how many it has; ``table`` int32 [chunks, pages]. Of each row to be
    sampled: ``last``, which one it is; ``temperatures`` float32, 0 for the best; ``seeds`` int64;
    ``draws``, the position in its answer.
    """

    def __init__(self, tokens: int, chunks: int, pages: int, device: torch.device) -> None:
        ints, wide, floats = torch.int32, torch.int64, torch.float32
        self.tokens, self.chunks, self.pages = tokens, chunks, pages
        self._packed = Packed(
            {
                "tokens": ((tokens,), ints),
                "positions": ((tokens,), ints),
                "places": ((tokens,), ints),
                "lengths": ((chunks,), ints),
                "contexts": ((chunks,), ints),
                "starts": ((chunks,), ints),
                "counts": ((chunks,), ints),
                "last": ((chunks,), ints),
                "draws": ((chunks,), ints),
                "temperatures": ((chunks,), floats),
                "seeds": ((chunks,), wide),
                "table": ((chunks, pages), ints),  # last: most of the bytes, and not all are sent
            },
            device,
        )
        self._packed.host["places"][:] = -1
        self.device = self._packed.device

    def begin(self) -> dict[str, npt.NDArray[Any]]:
        """The host's side, free to be written."""
        return self._packed.begin()

    def rows(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """On the device, of the first tokens: ids, positions and places [count]."""
        d = self.device
        return d["tokens"][:count], d["positions"][:count], d["places"][:count]

    def pad(self) -> None:
        """Make every row padding, here and on the device."""
        host = self.begin()
        host["places"][:], host["lengths"][:] = -1, 0
        self.upload(0)

    def upload(self, chunks: int) -> None:
        """One copy to the device; of the table the first ``chunks`` rows."""
        self._packed.upload(chunks)

    def image(self, chunks: int, pages: int) -> bytes:
        """All but the table, and of the first ``chunks`` the first ``pages`` pages."""
        return self._packed.image(chunks, pages)

    def receive(self, image: bytes, chunks: int, pages: int) -> None:
        """Take rank 0's ``image`` of so many, and start its copy to the device."""
        self._packed.receive(image, chunks, pages)

    def set_sampling(self, row: int, sequence: Sequence) -> None:
        """How a row's token is drawn, its position apart."""
        params, host = sequence.request.sampling, self._packed.host
        host["temperatures"][row] = params.temperature if draws_plainly(params) else 0.0
        host["seeds"][row] = signed(params.seed)

    def drawn(self, rows: Ints) -> list[int]:
        """Which of some sampled rows get a token by their temperature and seed."""
        return list(np.flatnonzero(self._packed.host["temperatures"][rows]))


def _none() -> Ints:
    return np.empty(0, np.int64)


@dataclass(slots=True)
class _Held:
    sequence: Sequence
    pages: list[int]  # the list itself: after a preemption the sequence has another one


@dataclass(slots=True)
class _Layout:
    """The step that is laid out, by chunk; ``end`` is above all of its ``rows``.

    ``short`` are the chunks whose token is on a page that the table lacks.
    """

    sequences: list[Sequence] = field(default_factory=list)
    lists: list[list[int]] = field(default_factory=list)  # of pages
    prompts: Ints = field(default_factory=_none)  # lengths
    rows: Ints = field(default_factory=_none)
    end: int = 0
    starts: list[int] = field(default_factory=list)
    short: Ints = field(default_factory=_none)


class DecodeRows:
    """Lays out steps in which every chunk is one token, in the first rows of ``buffers``.

    Row and chunk are the same here. Rows without a sequence have place -1 and length 0. Between
    ``fill`` and ``ahead`` the host's side is the step that runs, after ``ahead`` the one after it:
    all but its tokens, and the places on pages that its sequences do not have yet.
    """

    def __init__(self, buffers: StepBuffers, page_size: int) -> None:
        self.buffers, self._page_size = buffers, page_size
        self._held: list[_Held | None] = [None] * buffers.chunks
        self._pages = np.zeros(buffers.chunks, np.int64)  # in the table, by row
        self.mixtures: Mixtures = [()] * buffers.chunks  # by row
        self._layout = _Layout()

    def fill(self, batch: Seq[Chunk], bucket: int, slot: Callable[[str], int]) -> tuple[Ints, bool]:
        """Lay out a step in the first ``bucket`` rows, and start its copy to the device.

        Returns the row of each chunk, and whether ``mixtures`` have changed since the last call.
        """
        host = self.buffers.begin()
        sequences = [chunk.sequence for chunk in batch]
        lists = [sequence.pages for sequence in sequences]
        starts = [chunk.start for chunk in batch]
        same = (
            sequences == self._layout.sequences  # by identity, as sequences compare
            and all(map(is_, lists, self._layout.lists))
            and self._layout.end <= bucket
        )
        if not same:
            self._layout = _Layout()  # until all have their rows
            self._layout = self._place(sequences, bucket, slot)
        layout = self._layout
        if starts != layout.starts:
            self._lay_out(starts)
        if len(layout.short):
            self._add_pages()
        host["tokens"][layout.rows] = [
            sequence.tokens[start] for sequence, start in zip(sequences, starts, strict=True)
        ]
        self.buffers.upload(bucket)
        return layout.rows, not same

    def ahead(self) -> None:
        """Lay out the next step of the same sequences, each one token further.

        What the device reads is left alone, so this may be done while it computes a step.
        """
        self._lay_out([start + 1 for start in self._layout.starts])

    def reset(self) -> None:
        """Every row is padding."""
        for row in range(len(self._held)):
            self._clear(row)
        self._layout = _Layout()

    def _lay_out(self, starts: list[int]) -> None:
        """Everything of a step that is known of its sequences before its tokens are."""
        layout, host, size = self._layout, self.buffers.begin(), self._page_size
        rows, at = layout.rows, np.array(starts, np.int64)
        pages, after = at // size, at + 1
        host["positions"][rows] = at
        host["lengths"][rows] = after
        host["draws"][rows] = after - layout.prompts
        here = pages < self._pages[rows]
        known = rows[here]
        host["places"][known] = host["table"][known, pages[here]] * size + at[here] % size
        layout.starts, layout.short = starts, np.flatnonzero(~here)

    def _add_pages(self) -> None:
        """To the table, of the chunks that are short of one."""
        layout, host, size = self._layout, self.buffers.begin(), self._page_size
        table, places, counts = host["table"], host["places"], self._pages
        for i, row in zip(layout.short.tolist(), layout.rows[layout.short].tolist(), strict=True):
            pages, start, written = layout.lists[i], layout.starts[i], counts[row]
            table[row, written : len(pages)] = pages[written:]
            counts[row] = len(pages)
            places[row] = pages[start // size] * size + start % size
        layout.short = _none()

    def _place(self, sequences: list[Sequence], bucket: int, slot: Callable[[str], int]) -> _Layout:
        """Give every sequence a row below ``bucket``: its own where it has one."""
        wanted = set(sequences)
        kept: dict[Sequence, int] = {}
        for row, held in enumerate(self._held):
            if held is None:
                continue
            of = held.sequence
            if row < bucket and of in wanted and held.pages is of.pages:
                kept[of] = row
            else:
                self._clear(row)
        free = iter([row for row in range(bucket) if self._held[row] is None])
        for sequence in sequences:
            if sequence not in kept:
                kept[sequence] = row = next(free)
                self.mixtures[row] = tuple((slot(d), w) for d, w in sequence.weights)
                self.buffers.set_sampling(row, sequence)
                self._held[row] = _Held(sequence, sequence.pages)  # last: the row is whole
        return _Layout(
            sequences,
            [sequence.pages for sequence in sequences],
            np.array([sequence.prompt_length for sequence in sequences]),
            np.array([kept[sequence] for sequence in sequences]),
            max(kept.values()) + 1,
        )

    def _clear(self, row: int) -> None:
        host = self.buffers.begin()
        self._held[row], self.mixtures[row], self._pages[row] = None, (), 0
        for name in ("tokens", "positions", "lengths", "draws", "temperatures", "seeds"):
            host[name][row] = 0
        host["places"][row] = -1


def fill_prompts(buffers: StepBuffers, batch: Seq[Chunk], page_size: int) -> int:
    """Lay out any chunks one after another, and start the copy; how many rows are sampled.

    These are the first so many of ``last`` and of the fields beside it.
    """
    host = buffers.begin()
    chunks = len(batch)
    counts = np.fromiter((c.length for c in batch), np.int64, chunks)
    contexts = np.fromiter((c.start for c in batch), np.int64, chunks)
    starts = np.cumsum(counts) - counts
    of_token = np.repeat(np.arange(chunks), counts)
    total = len(of_token)
    positions = np.arange(total) - (starts - contexts)[of_token]
    table = host["table"]
    tokens: list[int] = []
    for i, chunk in enumerate(batch):
        end = chunk.start + chunk.length
        tokens += chunk.sequence.tokens[chunk.start : end]
        used = -(-end // page_size)
        table[i, :used] = chunk.sequence.pages[:used]
    host["tokens"][:total], host["positions"][:total] = tokens, positions
    pages = table[of_token, positions // page_size]
    host["places"][:total] = pages * page_size + positions % page_size
    host["contexts"][:chunks], host["counts"][:chunks] = contexts, counts
    host["starts"][:chunks], host["lengths"][:chunks] = starts, contexts + counts
    sampled = 0
    for i, chunk in enumerate(batch):
        if chunk.samples:
            host["last"][sampled] = starts[i] + counts[i] - 1
            host["draws"][sampled] = contexts[i] + counts[i] - chunk.sequence.prompt_length
            buffers.set_sampling(sampled, chunk.sequence)
            sampled += 1
    buffers.upload(chunks)
    return sampled
