"""One step's mixtures as a table on the device, of a fixed size, for kernels in CUDA graphs.

An entry is one row of the batch with one adapter of its mixture. Entries are sorted by slot, so
that rows of one adapter stand side by side; the rows that use adapters are sorted by the list of
their slots. Both are cut into tiles of at most ``tile_rows``: shrink takes tiles of entries (one
slot each), expand takes tiles of rows (one list of slots each), so that one program owns an output
and adds a row's adapters in the order of its mixture, which needs no atomics.

The table is int32 [1 + entries, columns]: a header, then records in which entry, tile and row of
one index stand side by side, so that what a step uses is one short copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]

# The header.
SHRINK_TILES, EXPAND_TILES = 0, 1
# A record: the entry's row; a tile of entries; a tile of rows (tiles of one row are the entries and
# the rows themselves, first and count are not written); a row and its mixture. Each adapter of it
# has four columns: entry, slot, weight (the bits of a float32), 2 * rank + (1 with DoRA).
ENTRY_ROW = 0
SHRINK_SLOT, SHRINK_FIRST, SHRINK_COUNT, SHRINK_RANK = 1, 2, 3, 4
EXPAND_FIRST, EXPAND_COUNT = 5, 6
ROW, ROW_ADAPTERS = 7, 8
MIXTURE, PER_ADAPTER = 9, 4
ENTRY, SLOT, WEIGHT, FACTS = 0, 1, 2, 3

# Rows of a tile: 1 is a vector product a row, more is a product of matrices.
VECTOR, SMALL, LARGE = 1, 16, 64
TILE_ROWS = (VECTOR, SMALL, LARGE)
# The mean of rows an adapter from which tiles of a size are the better ones, by reckoning: below 4
# the rows of an adapter find it in the cache, and a tile of 16 would be mostly empty.
SMALL_FROM, LARGE_FROM = 4, 48
VECTOR_ENTRIES = 1024  # above, tiles of 16: a vector product keeps many partial sums an entry


class MixtureBuffers:
    """The table of one step, and the pinned memory that it is made in.

    ``table`` never moves, so a captured graph reads the mixtures of whatever step was filled in
    last. Its kernels depend on ``tile_rows`` alone: a graph is captured for one size of tiles, and
    ``fill`` says which size a step is laid out for.
    """

    def __init__(self, max_rows: int, max_mixture: int, slots: int, device: torch.device) -> None:
        """Room for ``max_rows`` rows with at most ``max_mixture`` adapters of ``slots`` each."""
        self.max_rows, self.max_mixture, self.slots = max_rows, max_mixture, slots
        self.max_entries = max_rows * max_mixture
        self.columns = MIXTURE + PER_ADAPTER * max_mixture
        self.tile_rows = VECTOR
        self.entries = 0
        shape = (1 + self.max_entries, self.columns)
        self.table = torch.zeros(shape, dtype=torch.int32, device=device)
        # Two, as the copy of one step may still run while the next is laid out.
        pinned = device.type == "cuda"
        self._hosts = [torch.zeros(shape, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._views = [host.numpy() for host in self._hosts]
        event: Any = torch.cuda.Event
        self._copied = [event() for _ in range(2 if pinned else 0)]
        self._turn = 0

    def capacity(self, rows: int, tile_rows: int) -> tuple[int, int]:
        """The most tiles of entries and of rows that a batch of ``rows`` rows can have."""
        entries = rows * self.max_mixture
        if tile_rows == VECTOR:
            return min(entries, VECTOR_ENTRIES), rows
        # Every slot may end with a tile that is not full; so may every list of slots.
        return min(entries, entries // tile_rows + self.slots), rows

    def fill(
        self,
        mixtures: Sequence[Sequence[tuple[int, float]]],
        lengths: Sequence[int],
        ranks: Sequence[int],
        has_dora: Sequence[bool],
        tile_rows: int = 0,
    ) -> int:
        """Lay out a step: chunk i has ``lengths[i]`` rows and (slot, weight) pairs ``mixtures[i]``.

        ``ranks`` and ``has_dora`` are those of the slots. ``tile_rows`` is one of TILE_ROWS; 0
        takes the one that suits the mean of rows an adapter. Returns it. The copy is left running
        on the current stream. Raises ValueError for more than there is room for.
        """
        total = sum(lengths)
        counts = [len(mixture) for mixture in mixtures]
        widest = max(counts, default=0)
        if total > self.max_rows or widest > self.max_mixture:
            raise ValueError(
                f"a step of {total} rows with up to {widest} adapters a row; there is room for "
                f"{self.max_rows} and {self.max_mixture}"
            )
        slots = [slot for mixture in mixtures for slot, _ in mixture]
        n = len(slots)
        if total != len(lengths):
            n = sum(c * length for c, length in zip(counts, lengths, strict=True))
        tile_rows = tile_rows or best_tile_rows(n, len(set(slots)))
        if tile_rows == VECTOR and n > VECTOR_ENTRIES:
            raise ValueError(f"{n} entries in tiles of one row; at most {VECTOR_ENTRIES} fit")
        self.entries, self.tile_rows = n, tile_rows
        table = self._next_host()
        table[0, : EXPAND_TILES + 1] = 0
        if n:
            rows, chunks = _rows(counts, lengths if total != len(lengths) else None)
            groups = rows
            if tile_rows != VECTOR:
                lists = [tuple(slot for slot, _ in mixture) for mixture in mixtures]
                rows, chunks, groups = _by_list(rows, chunks, lists)
            facts = np.empty((len(slots), PER_ADAPTER), np.int32)
            facts[:, SLOT] = slots
            facts[:, WEIGHT] = _bits([weight for mixture in mixtures for _, weight in mixture])
            facts[:, FACTS] = [2 * ranks[slot] + has_dora[slot] for slot in slots]
            _write(table, np.array(counts), chunks, rows, facts)
            _write_tiles(table, n, groups, tile_rows)
        self._copy(1 + n)
        return tile_rows

    def image(self) -> bytes:
        """The step that was laid out last, for another process's ``receive``."""
        return self._views[self._turn][: 1 + self.entries].tobytes()

    def receive(self, image: bytes, tile_rows: int) -> None:
        """Take a step as another process has laid it out, in tiles of ``tile_rows``."""
        records = np.frombuffer(image, np.int32).reshape(-1, self.columns)
        self._next_host()[: len(records)] = records
        self.entries, self.tile_rows = len(records) - 1, tile_rows
        self._copy(len(records))

    def _next_host(self) -> npt.NDArray[np.int32]:
        self._turn ^= 1
        if self._copied:
            self._copied[self._turn].synchronize()
        return self._views[self._turn]

    def _copy(self, records: int) -> None:
        host = self._hosts[self._turn]
        self.table[:records].copy_(host[:records], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()


def best_tile_rows(entries: int, adapters: int) -> int:
    """The size of tiles that suits ``entries`` entries of ``adapters`` adapters."""
    mean = entries / max(adapters, 1)
    if mean >= SMALL_FROM or entries > VECTOR_ENTRIES:
        return LARGE if mean >= LARGE_FROM else SMALL
    return VECTOR


def _rows(counts: Sequence[int], lengths: Sequence[int] | None) -> tuple[Ints, Ints]:
    """The rows that use adapters, and the chunk of each; every chunk is one row without lengths."""
    if lengths is None:
        rows = np.flatnonzero(counts)
        return rows, rows
    chunks = np.repeat(np.arange(len(counts)), lengths)
    rows = np.flatnonzero(np.array(counts)[chunks])
    return rows, chunks[rows]


def _bits(weights: Sequence[float]) -> npt.NDArray[np.int32]:
    return np.array(weights, np.float32).view(np.int32)


def _write(
    table: npt.NDArray[np.int32],
    counts: Ints,
    chunks: Ints,
    rows: Ints,
    facts: npt.NDArray[np.int32],
) -> None:
    """Write the entries, sorted by slot, and the mixtures of ``rows``, in their order.

    ``facts`` are the records of the adapters of all chunks, one after the other, but for the entry.
    """
    records, adapters = table[1:], counts[chunks]
    row = number = None
    if len(facts) != len(rows) or adapters.max() > 1:
        row = np.repeat(np.arange(len(rows)), adapters)
        number = np.arange(len(row)) - np.repeat(_starts(adapters), adapters)
        facts = facts[_starts(counts)[chunks][row] + number]
    n = len(facts)
    order = facts[:, SLOT].argsort(kind="stable")
    facts[order, ENTRY] = np.arange(n)
    records[:n, ENTRY_ROW] = rows[order] if row is None else rows[row[order]]
    records[:n, SHRINK_SLOT] = facts[order, SLOT]
    records[:n, SHRINK_RANK] = facts[order, FACTS] >> 1
    records[: len(rows), ROW], records[: len(rows), ROW_ADAPTERS] = rows, adapters
    if row is None or number is None:
        records[:n, MIXTURE : MIXTURE + PER_ADAPTER] = facts
    else:
        mixtures = records[:, MIXTURE:].reshape(len(records), -1, PER_ADAPTER)
        mixtures[row, number] = facts


def _write_tiles(table: npt.NDArray[np.int32], n: int, groups: Ints, tile_rows: int) -> None:
    """Cut the entries and the rows, which are written already, into tiles."""
    table[0, SHRINK_TILES], table[0, EXPAND_TILES] = n, len(groups)
    records = table[1:]
    if tile_rows == VECTOR:  # the entries and the rows themselves
        return
    slots, ranks = records[:n, SHRINK_SLOT].copy(), records[:n, SHRINK_RANK].copy()
    first, count = _tiles(slots, tile_rows)
    tiles = records[: len(first)]
    tiles[:, SHRINK_FIRST], tiles[:, SHRINK_COUNT] = first, count
    tiles[:, SHRINK_SLOT], tiles[:, SHRINK_RANK] = slots[first], ranks[first]
    table[0, SHRINK_TILES] = len(first)
    first, count = _tiles(groups, tile_rows)
    records[: len(first), EXPAND_FIRST], records[: len(first), EXPAND_COUNT] = first, count
    table[0, EXPAND_TILES] = len(first)


def _by_list(rows: Ints, chunks: Ints, lists: Sequence[tuple[int, ...]]) -> tuple[Ints, Ints, Ints]:
    """Sort rows so that those with one list of slots stand together; also numbers the lists."""
    numbers: dict[tuple[int, ...], int] = {}
    of_chunk = np.array([numbers.setdefault(slots, len(numbers)) for slots in lists])
    groups = of_chunk[chunks]
    order = np.argsort(groups, kind="stable")
    return rows[order], chunks[order], groups[order]


def _starts(counts: Ints) -> Ints:
    return np.cumsum(counts) - counts


def _tiles(sorted_keys: npt.NDArray[Any], tile_rows: int) -> tuple[Ints, Ints]:
    """Cut runs of equal keys into tiles: the first index of each, and how many it has."""
    starts = np.flatnonzero(np.concatenate(([True], sorted_keys[1:] != sorted_keys[:-1])))
    counts = np.diff(np.append(starts, len(sorted_keys)))
    tiles = -(-counts // tile_rows)
    offset = (np.arange(tiles.sum()) - np.repeat(_starts(tiles), tiles)) * tile_rows
    first = np.repeat(starts, tiles) + offset
    return first, np.minimum(np.repeat(counts, tiles) - offset, tile_rows)
