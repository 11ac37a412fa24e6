"""The mixed adapter product by Triton: every row of a step with its own weighted adapters.

The formula, its slots and the torch reference are those of lora.py (``PooledAdapters``); the
kernels are in lora_kernels.py, the table that they read in mixtures.py. A site is two launches,
whatever the number of its projections and of the step's adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from mora_serve.model.kernels.lora_kernels import expand, shrink
from mora_serve.model.kernels.mixtures import (
    LARGE,
    SMALL,
    TILE_ROWS,
    VECTOR,
    VECTOR_ENTRIES,
    MixtureBuffers,
)
from mora_serve.model.kernels.operands import dot_type

__all__ = ["KernelAdapters", "MixtureBuffers", "Slots"]

RANKS = 16  # rows of A and B that a program holds at a time, the least that tl.dot takes
DOT_COLUMNS = 64  # of x and A at a time, where they are tiles
PROGRAMS = 8  # a multiprocessor, about what fits


@dataclass(frozen=True, slots=True)
class Blocks:
    """How much of a step a program does, by reckoning: none of it was measured on a card yet.

    ``columns`` of x a partial sum: where an adapter has one row many programs must share its A,
    where it has many the tiles are enough. ``outputs`` of expand, with ``warps`` warps.
    """

    columns: int
    outputs: int
    warps: int = 4


BLOCKS = {VECTOR: Blocks(512, 256), SMALL: Blocks(1024, 128), LARGE: Blocks(2048, 128, 8)}


class Slots(Protocol):
    """What holds the adapters: AdapterSlots, or Int8Slots whose parts have a ``scale`` besides."""

    ranks: list[int]
    has_dora: list[bool]
    max_rank: int
    dtype: torch.dtype
    device: torch.device

    @property
    def layers(self) -> Sequence[Mapping[str, tuple[Any, ...]]]:
        """The parts of each layer and site."""
        ...


@dataclass(frozen=True, slots=True)
class _Site:
    """A site's projections, padded to three for kernels that take three of each tensor."""

    parts: tuple[Any, ...]
    a: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scale: tuple[Tensor, ...] | None
    dora: tuple[Tensor, ...]
    widths: tuple[int, ...]
    columns: int

    @classmethod
    def of(cls, parts: Sequence[Any]) -> _Site:
        three = (*parts, *(parts[0],) * (3 - len(parts)))
        return cls(
            tuple(parts),
            tuple(p.a for p in three),
            tuple(p.b for p in three),
            tuple(p.scale for p in three) if hasattr(parts[0], "scale") else None,
            tuple(p.dora for p in three),
            tuple(p.b.shape[2] for p in parts) + (0,) * (3 - len(parts)),
            parts[0].a.shape[2],
        )

    def splits(self, tile_rows: int) -> int:
        """Partial sums of an inner product."""
        return -(-self.columns // BLOCKS[tile_rows].columns)


class KernelAdapters:
    """The adapters of whatever step ``buffers`` describe, read from the slots.

    Made once: it owns the device memory of the inner products. Its launches depend on x, y and
    ``buffers.tile_rows`` alone, so they can be captured in a CUDA graph and then do any mixtures
    that are filled in for that size of tiles. Rows without adapters are not touched. Sums are in
    float32; y is rounded once.

    ``early`` starts each kernel before the one ahead of it in the stream has ended, on a card of
    capability 9.0 or more; overlap.py says whether that is right and faster on one.
    """

    def __init__(self, slots: Slots, buffers: MixtureBuffers, early: bool = False) -> None:
        self.slots, self.buffers = slots, buffers
        self._options: dict[str, Any] = {"EARLY": early}
        if early:
            self._options["launch_pdl"] = True
        self._sites = [
            {site: _Site.of(parts) for site, parts in sites.items()} for sites in slots.layers
        ]
        self._entries = dict.fromkeys(TILE_ROWS, buffers.max_entries)
        self._entries[VECTOR] = min(buffers.max_entries, VECTOR_ENTRIES)
        # Every site of every layer writes its sums here: launches follow each other.
        self._inner = torch.empty(
            max(
                self._entries[rows] * site.splits(rows) * len(site.parts) * slots.max_rank
                for site in self._sites[0].values()
                for rows in TILE_ROWS
            ),
            dtype=torch.float32,
            device=slots.device,
        )
        self._programs = 1
        if slots.device.type == "cuda":
            properties = torch.cuda.get_device_properties(slots.device)
            self._programs = PROGRAMS * properties.multi_processor_count

    def fill(
        self,
        mixtures: Sequence[Sequence[tuple[int, float]]],
        lengths: Sequence[int],
        tile_rows: int = 0,
    ) -> int:
        """Lay out a step by the slots' ranks; see MixtureBuffers.fill."""
        slots = self.slots
        return self.buffers.fill(mixtures, lengths, slots.ranks, slots.has_dora, tile_rows)

    def apply(self, layer: int, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Add the mixture's delta to y in place; see decoder.Adapters.

        x [rows, in], y [rows, out], each row contiguous, and at most the buffers' rows.
        """
        s = self._sites[layer][site]
        self._shrink(s, x)
        self._expand(s, y)
        return y

    def _shrink(self, s: _Site, x: Tensor) -> None:
        rows = self.buffers.tile_rows
        splits, projections, chunk = s.splits(rows), len(s.parts), BLOCKS[rows].columns
        tiles, _ = self.buffers.capacity(len(x), rows)
        grid = (min(tiles * projections * splits, self._programs),)
        sizes = (s.columns, self._entries[rows], self.slots.max_rank)
        arguments = (x, x.stride(0), *s.a, self._inner, self.buffers.table, *sizes)
        vector = rows == VECTOR
        shrink[grid](
            *arguments,
            PROJECTIONS=projections,
            SPLITS=splits,
            CHUNK=chunk,
            BLOCK=triton.next_power_of_2(min(chunk, s.columns)) if vector else DOT_COLUMNS,
            RANKS=RANKS,
            STRIDE=self.buffers.columns,
            TILE_ROWS=rows,
            OPERAND=dot_type(x.dtype),
            num_warps=4,
            num_stages=3 if vector else 4,
            **self._options,
        )

    def _expand(self, s: _Site, y: Tensor) -> None:
        rows = self.buffers.tile_rows
        _, tiles = self.buffers.capacity(len(y), rows)
        size = BLOCKS[rows]
        blocks = sum(-(-width // size.outputs) for width in s.widths)
        grid = (min(tiles * blocks, self._programs),)
        sizes = (self._entries[rows], self.slots.max_rank)
        arguments = (
            *(y, y.stride(0), *s.b, *(s.scale or s.b), *s.dora, *s.widths),
            *(self._inner, self.buffers.table, *sizes),
        )
        splits = s.splits(rows)
        expand[grid](
            *arguments,
            SCALED=s.scale is not None,
            SPLITS=splits,
            SPLITS_UP=triton.next_power_of_2(splits),
            BLOCK=size.outputs,
            RANKS=RANKS,
            STRIDE=self.buffers.columns,
            TILE_ROWS=rows,
            OPERAND=dot_type(y.dtype),
            num_warps=size.warps,
            # One stage for tiles: a pipelined wgmma with an operand in registers can be compiled
            # wrong by ptxas before 13.3 (triton-lang/triton#9433).
            num_stages=3 if rows == VECTOR else 1,
            **self._options,
        )
