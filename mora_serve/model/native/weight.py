"""A 4-bit weight in the layout of the native path, with the interface of the others."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.model.native.library import (
    DENSE,
    LANES,
    NF4,
    LinearStruct,
    Native,
    WeightStruct,
    array,
)
from mora_serve.model.quant import BLOCK, DenseWeight, Linear, NF4Weight, Weight


@dataclass(slots=True)
class TiledNF4Weight:
    """A [out, in] matrix in NF4, in tiles of 16 rows (see product.h).

    ``codes`` uint8 [out / 16, in / 8, 64], ``absmax`` float32 [out / 16, in / 64, 16].
    """

    codes: Tensor
    absmax: Tensor
    native: Native
    _linear: NativeLinear | None = field(default=None, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return LANES * self.codes.shape[0], 8 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.codes.nbytes + self.absmax.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out]."""
        if x.requires_grad or x.dtype != self.native.dtype:
            return F.linear(x, self.dequantise(x.dtype))
        if self._linear is None:
            self._linear = NativeLinear(Linear((self,)))
        out = torch.empty(x.shape[0], self.shape[0])
        self.native.product(self._linear.struct, x.contiguous(), out)
        return out.to(x.dtype)

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``."""
        rows, columns = self.shape
        stop = rows if stop is None else min(stop, rows)
        out = torch.empty(stop - start, columns)
        tiles = (self.codes.data_ptr(), self.absmax.data_ptr())
        self.native.lib.mora_untile(*tiles, columns, start, stop, out.data_ptr())
        return out.to(dtype)


class NativeLinear:
    """A linear layer's structure, and what keeps its memory alive."""

    def __init__(self, linear: Linear) -> None:
        self._kept = linear
        self._parts = array(WeightStruct, [_part(p) for p in linear.parts])
        self.struct = LinearStruct(
            len(linear.parts),
            ctypes.cast(self._parts, ctypes.POINTER(WeightStruct)),
            None if linear.bias is None else linear.bias.data_ptr(),
        )


def can_tile(weight: Weight) -> bool:
    """Whether the native path takes this weight as it is or in tiles."""
    if not isinstance(weight, NF4Weight):
        return True
    rows, columns = weight.shape
    block = columns // weight.absmax.shape[1]
    return rows % LANES == 0 and columns % BLOCK == 0 and block % BLOCK == 0


def tiled(weight: Weight, native: Native) -> Weight:
    """The same numbers in the native layout; dense weights stay what they are, in one piece."""
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.weight.contiguous())
    if not isinstance(weight, NF4Weight):
        return weight
    rows, columns = weight.shape
    repeats = columns // weight.absmax.shape[1] // BLOCK
    absmax = weight.absmax.repeat_interleave(repeats, dim=1).contiguous()
    codes = torch.empty(rows // LANES, columns // 8, 64, dtype=torch.uint8)
    scales = torch.empty(rows // LANES, columns // BLOCK, LANES)
    before = (weight.codes.contiguous(), absmax)
    native.lib.mora_tile(
        *(t.data_ptr() for t in before), rows, columns, codes.data_ptr(), scales.data_ptr()
    )
    return TiledNF4Weight(codes, scales, native)


def _part(weight: Weight) -> WeightStruct:
    if isinstance(weight, DenseWeight):
        return WeightStruct(DENSE, *weight.shape, weight.weight.data_ptr(), None)
    if isinstance(weight, TiledNF4Weight):
        return WeightStruct(NF4, *weight.shape, weight.codes.data_ptr(), weight.absmax.data_ptr())
    raise TypeError(f"{type(weight).__name__} is not in the native layout")
