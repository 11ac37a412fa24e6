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

from mora_serve.model.kernels.lora_kernels import (
    expand_rows,
    expand_tiles,
    shrink_rows,
    shrink_tiles,
)
from mora_serve.model.kernels.mixtures import (
    TILE_ROWS,
    VECTOR,
    VECTOR_ENTRIES,
    MixtureBuffers,
)
from mora_serve.model.lora import AdapterSlots, ProjectionSlots

__all__ = ["KernelAdapters", "MixtureBuffers", "Slots", "dora_parts"]

# Columns of x a partial sum; the tiles of an adapter's rows and outputs that a program holds.
CHUNKS = {VECTOR: 512, 16: 1024, 64: 2048}
RANKS = 16
DOT_COLUMNS = 64
OUTPUTS = 128
PROGRAMS = 8  # a multiprocessor


class Part(Protocol):
    """One projection's adapters in all slots; see ProjectionSlots and Int8Projection."""

    a: Tensor
    b: Tensor
    start: int
    dora: Tensor | None


class Slots(Protocol):
    """What holds the adapters: AdapterSlots or Int8Slots."""

    ranks: list[int]
    has_dora: list[bool]
    max_rank: int
    device: torch.device

    @property
    def layers(self) -> Sequence[Mapping[str, tuple[Any, ...]]]:
        """The parts of each layer and site."""
        ...


def dora_parts(slots: Slots) -> int:
    """How many projections have DoRA scales.

    They get memory as adapters first need them. A graph captured before that does not read them:
    it is good only while this number is what it was.
    """
    parts = (p for sites in slots.layers for parts in sites.values() for p in parts)
    return sum(p.dora is not None for p in parts)


@dataclass(frozen=True, slots=True)
class _Site:
    """The arguments of a site's two launches that stay what they are."""

    parts: tuple[Any, ...]
    a: tuple[Tensor, Tensor, Tensor]
    b: tuple[Tensor, Tensor, Tensor]
    scale: tuple[Tensor, Tensor, Tensor] | None
    widths: tuple[int, int, int]
    columns: int

    def splits(self, tile_rows: int) -> int:
        """Partial sums of an inner product."""
        return -(-self.columns // CHUNKS[tile_rows])


class KernelAdapters:
    """The adapters of whatever step ``buffers`` describe, read from the slots.

    Made once: it owns the device memory of the inner products. Its launches depend on x, y and
    ``buffers.tile_rows`` alone, so they can be captured in a CUDA graph and then do any mixtures
    that are filled in for that size of tiles (see also dora_parts). Rows without adapters are
    not touched. Sums are in float32; y is rounded once.
    """

    def __init__(self, slots: Slots, buffers: MixtureBuffers) -> None:
        self.slots, self.buffers = slots, buffers
        self._sites = [
            {site: _site(parts) for site, parts in sites.items()} for sites in slots.layers
        ]
        entries = {
            rows: min(buffers.max_entries, VECTOR_ENTRIES)
            if rows == VECTOR
            else buffers.max_entries
            for rows in TILE_ROWS
        }
        # One layer's sums at a time, so all sites share them; sites of one layer are alike.
        self._inner = torch.empty(
            max(
                entries[rows] * site.splits(rows) * len(site.parts) * slots.max_rank
                for site in self._sites[0].values()
                for rows in TILE_ROWS
            ),
            dtype=torch.float32,
            device=slots.device,
        )
        cuda = slots.device.type == "cuda"
        # The interpreter is one program after the other; it has no products of bfloat16.
        self._programs = (
            PROGRAMS * torch.cuda.get_device_properties(slots.device).multi_processor_count
            if cuda
            else 2
        )
        self._interpreted = not cuda

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
        s, buffers = self._sites[layer][site], self.buffers
        rows = buffers.tile_rows
        tiles, row_tiles = buffers.capacity(len(x), rows)
        splits, projections = s.splits(rows), len(s.parts)
        common = {"STRIDE": buffers.columns, "RANKS": RANKS}
        ends = (self._inner, buffers.table)
        sizes = (buffers.max_entries, self.slots.max_rank)
        operand = torch.float32 if self._interpreted else x.dtype
        dots: dict[str, Any] = {}
        if rows != VECTOR:
            dots = {"TILE_ROWS": rows, "OPERAND": _TYPES[operand]}
        shrink = shrink_rows if rows == VECTOR else shrink_tiles
        chunk = CHUNKS[rows]
        grid = (min(tiles * projections * splits, self._programs),)
        shrink[grid](
            *(x, x.stride(0), *s.a, *ends, s.columns, *sizes),
            **{**common, **dots, "PROJECTIONS": projections, "SPLITS": splits, "CHUNK": chunk},
            BLOCK=triton.next_power_of_2(min(chunk, s.columns)) if rows == VECTOR else DOT_COLUMNS,
        )
        scales = s.b if s.scale is None else s.scale
        dora, mask = _dora(s)
        if rows == VECTOR:
            dots = {"SPLITS_UP": triton.next_power_of_2(splits)}
        expand = expand_rows if rows == VECTOR else expand_tiles
        blocks = sum(-(-width // OUTPUTS) for width in s.widths)
        grid = (min(row_tiles * blocks, self._programs),)
        expand[grid](
            *(y, y.stride(0), *s.b, *scales, *dora, *s.widths, *ends, *sizes),
            **{**common, **dots, "SCALED": s.scale is not None, "DORA": mask, "SPLITS": splits},
            BLOCK=OUTPUTS,
        )
        return y


_TYPES = {
    torch.float32: triton.language.float32,
    torch.float16: triton.language.float16,
    torch.bfloat16: triton.language.bfloat16,
}


def _site(parts: Sequence[Any]) -> _Site:
    three = (*parts, *(parts[0],) * (3 - len(parts)))
    widths = (*(p.b.shape[2] for p in parts), 0, 0)[:3]
    scales = None
    if getattr(parts[0], "scale", None) is not None:
        scales = tuple(p.scale for p in three)
    return _Site(
        tuple(parts),
        tuple(p.a for p in three),  # type: ignore[arg-type]
        tuple(p.b for p in three),  # type: ignore[arg-type]
        scales,  # type: ignore[arg-type]
        widths,
        parts[0].a.shape[2],
    )


def _dora(site: _Site) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """The DoRA scales of three projections, and a bit for each that has any."""
    found = [p.dora for p in site.parts]
    known = next((d for d in found if d is not None), None)
    if known is None:
        return site.b, 0
    three = [known if d is None else d for d in (*found, None, None)[:3]]
    mask = sum(1 << i for i, d in enumerate(found) if d is not None)
    return (three[0], three[1], three[2]), mask
