"""Adapters in 8 bits: what a decode step reads of them is half.

Each row of A and each row of B (one rank of one projection in one slot) is int8 with the greatest
of its magnitudes at 127. Row r of A and row r of B meet in the product B[r] (A[r] x), so the two
scales are kept as one float32 number, which expand applies to the inner product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mora_serve.model.lora import AdapterSlots, ProjectionSlots

LEVELS = 127


@dataclass(slots=True)
class Int8Projection:
    """One projection's adapters in all slots; ``start`` and ``dora`` as in ProjectionSlots.

    ``a`` int8 [slots, max_rank, in], ``b`` int8 [slots, max_rank, out], ``scale`` float32 [slots,
    max_rank].
    """

    a: Tensor
    b: Tensor
    scale: Tensor
    dora: Tensor
    start: int


class Int8Slots:
    """The adapters of 16- or 32-bit slots in 8 bits, as they are when this is made."""

    def __init__(self, slots: AdapterSlots) -> None:
        self.slots, self.max_rank = slots.slots, slots.max_rank
        self.dtype, self.device = slots.dtype, slots.device
        self.ranks, self.has_dora = list(slots.ranks), list(slots.has_dora)
        self.layers = [
            {site: tuple(map(_quantised, parts)) for site, parts in sites.items()}
            for sites in slots.layers
        ]

    @property
    def nbytes(self) -> int:
        """Device memory of all slots."""
        parts = [p for sites in self.layers for parts in sites.values() for p in parts]
        return sum(p.a.nbytes + p.b.nbytes + p.scale.nbytes for p in parts)

    def dequantised(self, projection: Int8Projection) -> ProjectionSlots:
        """The same numbers in float32, all of the scale in B: the kernels' torch reference."""
        b = projection.b.float() * projection.scale[..., None]
        return ProjectionSlots(projection.a.float(), b, projection.dora, projection.start)


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., n] and float32 scales [...] with matrix ~ int8 * scale, each row on its own.

    The error of an element is at most half of its row's scale. A row that is not finite gets a
    scale that is not: what is made of it is NaN, not some number.
    """
    rows = matrix.float()
    scale = rows.abs().amax(-1) / LEVELS
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (rows / divisor[..., None]).round().to(torch.int8), scale


def _quantised(part: ProjectionSlots) -> Int8Projection:
    (a, a_scale), (b, b_scale) = quantise_rows(part.a), quantise_rows(part.b)
    return Int8Projection(a, b, a_scale * b_scale, part.dora, part.start)
