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
from mora_serve.model.group_quant import MIDDLE, GroupWeight, in_order, same_order
from mora_serve.model.memory import Arena
from mora_serve.model.native.library import (
    DENSE,
    INT4,
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

HALF_BLOCK = 32


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
        x = in_order(x, weight_order(self))
        self.native.product(self._linear.struct, x.contiguous(), out)
        return out.to(x.dtype)


@dataclass(slots=True)
class TiledCodes(Tiled):
    """4-bit codes: ``codes`` uint8 [out / 16, in / 8, 64], NF4 or whole numbers by ``kind``.

    ``scales`` float32 [out / 16, in / span rounded up, 16]; of whole numbers also ``offsets``, or
    None where all are 0. ``block`` inputs are summed at a time. ``order`` int32 [in]: see
    GroupWeight.
    """

    kind: int
    codes: Tensor
    scales: Tensor
    span: int = BLOCK
    block: int = BLOCK
    offsets: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return LANES * self.codes.shape[0], 8 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        kept = (self.codes, self.scales, self.offsets, self.order)
        return sum(t.nbytes for t in kept if t is not None)

    def struct(self) -> WeightStruct:
        """What C is told of it."""
        offsets = None if self.offsets is None else self.offsets.data_ptr()
        pointers = (self.codes.data_ptr(), self.scales.data_ptr(), offsets)
        return WeightStruct(self.kind, *self.shape, self.block, self.span, *pointers)

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``, inputs as x has them."""
        rows, columns = self.shape
        stop = rows if stop is None else min(stop, rows)
        out = torch.empty(stop - start, columns)
        self.native.lib.mora_untile(ctypes.byref(self.struct()), start, stop, out.data_ptr())
        return (out if self.order is None else out[:, self.order.argsort()]).to(dtype)


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
        order = weight_order(linear.parts[0])
        self.struct = LinearStruct(
            len(linear.parts),
            ctypes.cast(self._parts, ctypes.POINTER(WeightStruct)),
            None if linear.bias is None else linear.bias.data_ptr(),
            None if order is None else order.data_ptr(),
        )


def weight_order(weight: Weight) -> Tensor | None:
    """The order in which a weight has its inputs, None for that of x."""
    return weight.order if isinstance(weight, (GroupWeight, TiledCodes)) else None


def can_tile_layer(linear: Linear) -> bool:
    """Whether the native path takes this layer: all parts, with their inputs in one order."""
    order = weight_order(linear.parts[0])
    return all(can_tile(p) and same_order(order, weight_order(p)) for p in linear.parts)


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
    if isinstance(weight, GroupWeight):
        return weight.shape[0] % LANES == 0 and _block(weight) > 0
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
    if isinstance(weight, NF4Weight):
        repeats = weight.shape[1] // weight.absmax.shape[1] // BLOCK
        absmax = weight.absmax.repeat_interleave(repeats, dim=1)
        codes = _tiled_codes(weight.codes, native, arena)
        return TiledCodes(NF4, codes, _by_tile(absmax, arena), native=native)
    if isinstance(weight, GroupWeight):
        offsets = None
        if weight.zeros is not None:
            offsets = _by_tile(weight.scales * (MIDDLE - weight.zeros.float()), arena)
        return TiledCodes(
            INT4,
            _tiled_codes(weight.codes, native, arena),
            _by_tile(weight.scales, arena),
            weight.group,
            _block(weight),
            offsets,
            None if weight.order is None else weight.order.to(torch.int32),
            native=native,
        )
    return weight


def _block(weight: GroupWeight) -> int:
    """How many inputs the native path sums at a time; 0 where it cannot."""
    sizes = (BLOCK, HALF_BLOCK)
    fits = (n for n in sizes if weight.shape[1] % n == 0 and weight.group % n == 0)
    return next(fits, 0)


def _tiled_codes(codes: Tensor, native: Native, arena: Arena) -> Tensor:
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    tiles = arena.zeros((rows // LANES, columns // 8, 64), torch.uint8)
    packed = codes.contiguous()
    native.lib.mora_tile(packed.data_ptr(), rows, columns, tiles.data_ptr())
    return tiles


def _by_tile(of_blocks: Tensor, arena: Arena) -> Tensor:
    """[out, n] -> [out / 16, n, 16]."""
    return arena.copy(of_blocks.view(-1, LANES, of_blocks.shape[1]).transpose(1, 2))


def weight_struct(weight: Weight) -> WeightStruct:
    """A weight's structure. Raises TypeError for one that the native path does not take."""
    if isinstance(weight, DenseWeight):
        return WeightStruct(DENSE, *weight.shape, 0, 0, weight.weight.data_ptr())
    if isinstance(weight, TiledCodes):
        return weight.struct()
    if isinstance(weight, TiledDenseWeight):
        return WeightStruct(TILED, *weight.shape, 0, 0, weight.tiles.data_ptr())
    raise TypeError(f"{type(weight).__name__} is not in the native layout")
