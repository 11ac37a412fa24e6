"""Weights in the layout of the native path, with the interface of the others."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.model.footprint import BLOCK
from mora_serve.model.memory import Arena
from mora_serve.model.native.library import (
    DENSE,
    LANES,
    NF4,
    TILED,
    LinearStruct,
    Native,
    WeightStruct,
    array,
)
from mora_serve.model.quant import (
    CHUNK_ELEMENTS,
    DenseWeight,
    Linear,
    NF4Weight,
    Table,
    Weight,
)


@dataclass(slots=True, kw_only=True)
class Tiled:
    """A [out, in] matrix in tiles of 16 rows (see product.h)."""

    native: Native
    _linear: NativeLinear | None = field(default=None, init=False)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes resident."""

    @abstractmethod
    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``."""

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out]."""
        if x.requires_grad or x.dtype != self.native.dtype:
            return F.linear(x, self.dequantise(x.dtype))
        if self._linear is None:
            self._linear = NativeLinear(Linear((self,)))
        out = torch.empty(x.shape[0], self.shape[0])
        self.native.product(self._linear.struct, x.contiguous(), out)
        return out.to(x.dtype)


@dataclass(slots=True)
class TiledNF4Weight(Tiled):
    """NF4: ``codes`` uint8 [out / 16, in / 8, 64], ``absmax`` float32 [out / 16, in / 64, 16]."""

    codes: Tensor
    absmax: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return LANES * self.codes.shape[0], 8 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.codes.nbytes + self.absmax.nbytes

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``."""
        rows, columns = self.shape
        stop = rows if stop is None else min(stop, rows)
        out = torch.empty(stop - start, columns)
        tiles = (self.codes.data_ptr(), self.absmax.data_ptr())
        self.native.lib.mora_untile(*tiles, columns, start, stop, out.data_ptr())
        return out.to(dtype)


@dataclass(slots=True)
class TiledDenseWeight(Tiled):
    """Unquantised numbers that bfloat16 holds exactly: half the bytes of float32.

    ``tiles`` bfloat16 [out / 16 rounded up, in / 2, 16, 2], of which ``out`` rows count.
    """

    tiles: Tensor
    out: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out, 2 * self.tiles.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.tiles.nbytes

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``."""
        rows = torch.arange(self.out)[start:stop]
        return self.rows(rows, dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See DenseWeight."""
        tile = torch.div(indices, LANES, rounding_mode="floor")
        return self.tiles[tile, :, indices % LANES].flatten(1).to(dtype)


class NativeLinear:
    """A linear layer's structure, and what keeps its memory alive."""

    def __init__(self, linear: Linear) -> None:
        self._kept = linear
        self._parts = array(WeightStruct, [weight_struct(p) for p in linear.parts])
        self.struct = LinearStruct(
            len(linear.parts),
            ctypes.cast(self._parts, ctypes.POINTER(WeightStruct)),
            None if linear.bias is None else linear.bias.data_ptr(),
        )


def _tiled_dense(weight: Tensor, native: Native, arena: Arena) -> Weight:
    rows, columns = weight.shape
    step = max(1, CHUNK_ELEMENTS // columns // LANES) * LANES
    chunks = [(start, weight[start : start + step]) for start in range(0, rows, step)]
    if columns % BLOCK or not all(torch.equal(c, c.bfloat16().to(c.dtype)) for _, c in chunks):
        return DenseWeight(arena.copy(weight))
    tiles = arena.zeros((-(-rows // LANES), columns // 2, LANES, 2), torch.bfloat16)
    for start, chunk in chunks:
        padded = F.pad(chunk.bfloat16(), (0, 0, 0, -len(chunk) % LANES))
        by_tile = padded.view(-1, LANES, columns // 2, 2).transpose(1, 2)
        tiles[start // LANES :][: len(by_tile)] = by_tile
    return TiledDenseWeight(tiles, rows, native=native)


def can_tile(weight: Weight) -> bool:
    """Whether the native path takes this weight as it is or in tiles."""
    if not isinstance(weight, NF4Weight):
        return True
    rows, columns = weight.shape
    block = columns // weight.absmax.shape[1]
    return rows % LANES == 0 and columns % BLOCK == 0 and block % BLOCK == 0


@overload
def tiled(weight: Table, native: Native, arena: Arena) -> Table: ...
@overload
def tiled(weight: Weight, native: Native, arena: Arena) -> Weight: ...
def tiled(weight: Weight, native: Native, arena: Arena) -> Weight:
    """The same numbers in the native layout, in the arena's memory."""
    if isinstance(weight, DenseWeight):
        return _tiled_dense(weight.weight, native, arena)
    if not isinstance(weight, NF4Weight):
        return weight
    rows, columns = weight.shape
    repeats = columns // weight.absmax.shape[1] // BLOCK
    absmax = weight.absmax.repeat_interleave(repeats, dim=1).contiguous()
    codes = arena.zeros((rows // LANES, columns // 8, 64), torch.uint8)
    scales = arena.zeros((rows // LANES, columns // BLOCK, LANES), torch.float32)
    before = (weight.codes.contiguous(), absmax)
    native.lib.mora_tile(
        *(t.data_ptr() for t in before), rows, columns, codes.data_ptr(), scales.data_ptr()
    )
    return TiledNF4Weight(codes, scales, native=native)


def weight_struct(weight: Weight) -> WeightStruct:
    """A weight's structure. Raises TypeError for one that the native path does not take."""
    if isinstance(weight, DenseWeight):
        return WeightStruct(DENSE, *weight.shape, weight.weight.data_ptr(), None)
    if isinstance(weight, TiledNF4Weight):
        return WeightStruct(NF4, *weight.shape, weight.codes.data_ptr(), weight.absmax.data_ptr())
    if isinstance(weight, TiledDenseWeight):
        return WeightStruct(TILED, *weight.shape, weight.tiles.data_ptr(), None)
    raise TypeError(f"{type(weight).__name__} is not in the native layout")
