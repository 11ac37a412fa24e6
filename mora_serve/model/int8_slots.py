"""Adapters in 8 bits: half the memory, and half of what a step reads of them.

Each row of A and each row of B (one rank of one projection in one slot) is int8 with the greatest
of its magnitudes at 127. Row r of A and row r of B meet in the product B[r] (A[r] x), so the two
scales are kept as one float32 number, which Triton's kernels apply to the inner product and torch,
their reference, to B. DoRA's scales stay what they are for the adapter as it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mora_serve.model.lora import AdapterSlots, ProjectionSlots, ReadFactors
from mora_serve.model.memory import Arena
from mora_serve.model.shape import ModelShape

LEVELS = 127


@dataclass(slots=True, kw_only=True)
class Int8Projection(ProjectionSlots):
    """One projection's adapters: ``a`` and ``b`` int8, ``scale`` float32 [slots, max_rank]."""

    scale: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See ProjectionSlots."""
        return self.a, self.b, self.scale

    def encode(self, rows: Sequence[Tensor], read: ReadFactors) -> None:
        """See ProjectionSlots; rounded from float32."""
        a, b = (torch.empty(t.shape) for t in rows[:2])
        read(a, b)
        for to, numbers in zip(rows, _quantised(a, b), strict=True):
            to.copy_(numbers)

    def factors(self, slots: int | slice, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See ProjectionSlots; all of the scale in B."""
        b = self.b[slots, :rank].float() * self.scale[slots, :rank, None]
        return self.a[slots, :rank].to(dtype), b.to(dtype)


class Int8Slots(AdapterSlots):
    """Slots that keep A and B in 8 bits."""

    @classmethod
    def of(cls, shape: ModelShape, slots: AdapterSlots) -> Int8Slots:
        """What slots of a compute type hold now."""
        made = cls(shape, slots.slots, slots.max_rank, slots.dtype, slots.device)
        made.ranks[:], made.has_dora[:] = slots.ranks, slots.has_dora
        for part, other in zip(made.parts(), slots.parts(), strict=True):
            for to, numbers in zip(part.tensors, _quantised(other.a, other.b), strict=True):
                to.copy_(numbers)
            part.dora = other.dora
        return made

    def _part(self, arena: Arena, columns: int, dora: Tensor, start: int) -> ProjectionSlots:
        each = self.slots, self.max_rank
        sizes = [(*each, n) for n in (columns, dora.shape[1])]
        a, b = (arena.zeros(size, torch.int8, self.device) for size in sizes)
        scale = arena.zeros(each, torch.float32, self.device)
        return Int8Projection(a, b, dora, start, scale=scale)


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., n] and float32 scales [...] with matrix ~ int8 * scale, each row on its own.

    The error of an element is at most half of its row's scale. A row that is not finite gets a
    scale that is not: what is made of it is NaN, not some number.
    """
    rows = matrix.float()
    scale = rows.abs().amax(-1) / LEVELS
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    numbers = (rows / divisor[..., None]).round_().clamp_(-LEVELS, LEVELS)
    return numbers.to(torch.int8), scale


def _quantised(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (numbers_a, scale_a), (numbers_b, scale_b) = quantise_rows(a), quantise_rows(b)
    return numbers_a, numbers_b, scale_a * scale_b
