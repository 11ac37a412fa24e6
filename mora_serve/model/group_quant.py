"""A weight in 4-bit whole numbers with a scale and a zero for each group of inputs.

What GPTQ and AWQ compute, kept exactly: W = scale (code - zero). GPTQ (Frantar et al. 2022, arXiv
2210.17323) with act-order forms its groups of inputs that do not stand side by side; here inputs
are sorted by group once, and a product takes x in that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mora_serve.model.quant import CARD_CHUNK_ELEMENTS, by_chunks

MIDDLE = 8  # the zero of a weight that was quantised symmetrically


@dataclass(slots=True)
class GroupWeight:
    """A [out, in] matrix: ``codes`` uint8 [out, in/2], the earlier input in the high half.

    ``scales`` float32 and ``zeros`` uint8 [out, groups], of ``group`` inputs each, the last one
    perhaps of fewer; zeros None is 8 everywhere. ``order`` int64 [in], where it is not None, says
    which input of x the codes have at each place.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        kept = (self.codes, self.scales, self.zeros, self.order)
        return sum(t.nbytes for t in kept if t is not None)

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out], a chunk of output rows at a time."""
        return by_chunks(in_order(x, self.order), self.shape, self._sorted)

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``, inputs as x has them."""
        out = self._sorted(dtype, start, self.shape[0] if stop is None else stop)
        return out if self.order is None else out[:, self.order.argsort()]

    def _sorted(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Rows of the matrix in the order of the codes.

        A few at a time: in float32 all of a large matrix is more than a card keeps free for it.
        """
        step = max(1, CARD_CHUNK_ELEMENTS // self.shape[1])
        if stop - start <= step:
            return self._values(start, stop).to(dtype)
        out = torch.empty(stop - start, self.shape[1], dtype=dtype, device=self.codes.device)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            out[first - start : last - start] = self._values(first, last)
        return out

    def _values(self, start: int, stop: int) -> Tensor:
        """Rows in float32, in the order of the codes."""
        codes, scales = self.codes[start:stop], self.scales[start:stop]
        zeros = None if self.zeros is None else self.zeros[start:stop].float()
        values = torch.empty(*codes.shape, 2, device=codes.device)
        values[..., 0], values[..., 1] = codes >> 4, codes & 15
        values = values.flatten(1)
        columns = values.shape[1]
        full = columns // self.group
        # exact in float32: 5 bits times the 11 of a scale that was stored in 16
        for first, last, size in ((0, full, self.group), (full, full + 1, columns % self.group)):
            if size and first < last:
                of_groups = values[:, first * self.group :][:, : (last - first) * size]
                part = of_groups.view(len(codes), last - first, size)
                part.sub_(MIDDLE if zeros is None else zeros[:, first:last, None])
                part.mul_(scales[:, first:last, None])
        return values

    def stacked(self, below: object) -> Self | None:
        """See Stackable."""
        if not isinstance(below, GroupWeight) or self.group != below.group:
            return None
        if not same_order(self.order, below.order):
            return None
        zeros = None
        if self.zeros is not None or below.zeros is not None:
            zeros = torch.cat([_or_middle(self), _or_middle(below)])
        return type(self)(
            torch.cat([self.codes, below.codes]),
            torch.cat([self.scales, below.scales]),
            zeros,
            self.group,
            self.order,
        )


def in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """x [rows, in] with its inputs as a weight of this order has them."""
    return x if order is None else x[:, order]


def same_order(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two weights have their inputs in one order."""
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)


def _or_middle(weight: GroupWeight) -> Tensor:
    if weight.zeros is not None:
        return weight.zeros
    return torch.full(weight.scales.shape, MIDDLE, dtype=torch.uint8, device=weight.scales.device)
