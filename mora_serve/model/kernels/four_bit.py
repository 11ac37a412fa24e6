"""y = x W^T for few rows, straight from 4-bit codes: NF4's, or those of GPTQ and AWQ.

The references are NF4Weight (model/quant.py) and GroupWeight (model/group_quant.py). Both hold two
codes of a row in a byte, the first in its high half, and a scale for each block of columns; what a
code stands for differs: one of sixteen values (QLoRA, https://arxiv.org/abs/2305.14314, appendix
E), or the code less its block's zero.

One kernel in two forms: a row at a time in float32 without tensor cores, for one row or a few, and
tiles of rows by tl.dot, where the codes' values are in x's type (rounded to it for NF4, exact for
whole numbers) and the scale is applied in float32 after each block's product. The input dimension
can be split over programs; the parts are summed in their order, so that a plan gives the same bits
each time, and a row's do not depend on the other rows. A second kernel writes the whole matrix, for
a dense product of more rows.

Whether a plan beats the other ways only a card can tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mora_serve.model.group_quant import MIDDLE, GroupWeight, in_order
from mora_serve.model.kernels.operands import dot_type
from mora_serve.model.quant import VALUES, NF4Weight

MOST_ROWS = 256  # that it is meant for; more are better served by dequantising once
PROGRAMS = 264  # that the default plan aims at: two for each of an H100's processors
LONGEST_PIECE = 128  # columns that one tl.dot takes
SHORTEST_PIECE = 32  # it takes no fewer than 16 from each half of the bytes
DENSE_TILE = 32  # features that a program of the dense kernel writes
# How a code's value is found: in a "table" in memory or by a "tree" of selections; for whole
# numbers by a "cast", or as the low "bits" of a float whose exponent makes them count by ones.
NF4_LOOKUPS, GROUP_LOOKUPS = ("table", "tree"), ("cast", "bits")
_MIDDLE = tl.constexpr(MIDDLE)

FourBit = NF4Weight | GroupWeight


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut.

    ``tile_rows`` 0 is a row at a time, otherwise the rows of x in a tile; ``tile_out`` output
    features in a tile; ``columns`` a turn; ``splits`` programs that share the input dimension.
    """

    tile_rows: int
    tile_out: int
    columns: int
    splits: int
    lookup: str
    warps: int = 4
    stages: int = 3


def default_plan(rows: int, out: int, columns: int, lookup: str) -> Plan:
    """A plan from sizes alone, none of which was measured on a card yet."""
    if rows == 1:
        # 512 bytes of a feature a turn: enough loads on their way to keep a card's memory busy
        # without splits, whose sum would be a launch more. More features where no turn fits.
        turn = _fitting(1024, columns)
        tile_rows, tile_out = 0, min(4 * 1024 // turn, 16)
        programs = triton.cdiv(out, tile_out)
    else:
        tile_rows = min(max(triton.next_power_of_2(rows), 16), 64)
        tile_out, turn = 64, 128
        programs = triton.cdiv(out, tile_out) * triton.cdiv(rows, tile_rows)
    useful = max(columns // 1024, 1)  # so that a part is worth its sum
    splits = triton.next_power_of_2(max(min(PROGRAMS // programs, useful, 16), 1))
    return Plan(tile_rows, tile_out, turn, splits, lookup)


class _Stored(NamedTuple):
    """What a weight keeps beside its codes; a scale is that of ``block`` columns."""

    scales: Tensor
    zeros: Tensor | None
    block: int
    order: Tensor | None
    lookups: tuple[str, ...]


def _stored(weight: FourBit) -> _Stored:
    if isinstance(weight, NF4Weight):
        block = weight.shape[1] // weight.absmax.shape[1]
        return _Stored(weight.absmax, None, block, None, NF4_LOOKUPS)
    group = min(weight.group, weight.shape[1])
    return _Stored(weight.scales, weight.zeros, group, weight.order, GROUP_LOOKUPS)


class FourBitProduct:
    """The product on one device for x of one type."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.values = torch.tensor(VALUES, dtype=torch.float32, device=device)
        self.rounded = self.values.to(dtype)

    def __call__(self, x: Tensor, weight: FourBit, plan: Plan, out: Tensor | None = None) -> Tensor:
        """x [rows, in], contiguous -> x @ W.T [rows, out]; ``out`` is filled when given.

        Raises ValueError for a plan of another kind of weight, and for groups of inputs that share
        no factor of SHORTEST_PIECE with it or with their number.
        """
        stored = _stored(weight)
        _need(plan.lookup, stored)
        rows, columns = x.shape
        features = weight.shape[0]
        length = _piece(stored.block, columns)
        if length < SHORTEST_PIECE:
            raise ValueError(f"groups of {stored.block} of {columns} inputs")
        x = in_order(x, stored.order)  # once: programs would each read more of it than of codes
        if out is None:
            out = x.new_empty(rows, features)
        parts = out
        if plan.splits > 1:
            parts = x.new_empty(plan.splits, rows, features, dtype=torch.float32)
        by_row = plan.tile_rows == 0
        blocks = rows if by_row else triton.cdiv(rows, plan.tile_rows)
        _product_kernel[(triton.cdiv(features, plan.tile_out), blocks, plan.splits)](
            *(x, weight.codes, stored.scales, stored.zeros),
            *(self.values if by_row else self.rounded, parts, rows, features),
            COLUMNS=columns,
            BLOCK=stored.block,
            SCALES=stored.scales.shape[1],
            LENGTH=length,
            PIECES=_fitting(plan.columns // length, columns // length),
            TILE_OUT=plan.tile_out,
            TILE_ROWS=plan.tile_rows,
            SPLITS=plan.splits,
            LOOKUP=plan.lookup,
            DOT=tl.float32 if by_row else dot_type(x.dtype),
            num_warps=plan.warps,
            num_stages=plan.stages,
        )
        if plan.splits > 1:
            grid = (triton.cdiv(rows * features, 1024),)
            _sum_kernel[grid](parts, out, rows * features, SPLITS=plan.splits, SIZE=1024)
        return out

    def dense(self, weight: FourBit, dtype: torch.dtype, lookup: str = "") -> Tensor:
        """The matrix [out, in] in ``dtype``, its inputs as the codes have them (see in_order)."""
        stored = _stored(weight)
        lookup = lookup or stored.lookups[0]
        _need(lookup, stored)
        features, columns = weight.shape
        length = _piece(stored.block, columns)
        out = torch.empty(features, columns, dtype=dtype, device=weight.codes.device)
        _dense_kernel[(triton.cdiv(features, DENSE_TILE), columns // length)](
            *(weight.codes, stored.scales, stored.zeros, self.values, out, features),
            COLUMNS=columns,
            BLOCK=stored.block,
            SCALES=stored.scales.shape[1],
            LENGTH=length,
            TILE_OUT=DENSE_TILE,
            LOOKUP=lookup,
        )
        return out

    def by_dense(self, x: Tensor, weight: FourBit) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out], W written in x's type first."""
        x = in_order(x, _stored(weight).order)
        return torch.nn.functional.linear(x, self.dense(weight, x.dtype))


def _need(lookup: str, stored: _Stored) -> None:
    if lookup not in stored.lookups:
        raise ValueError(f"values by {lookup}, where {' or '.join(stored.lookups)} finds them")


def _piece(block: int, columns: int) -> int:
    """The columns that are taken together: a power of two, none across blocks or beyond the end."""
    whole = math.gcd(block, columns)
    return min(whole & -whole, LONGEST_PIECE)


def _fitting(wanted: int, count: int) -> int:
    """The largest power of two up to ``wanted`` that divides ``count``."""
    return max(1, min(wanted, count & -count))


@triton.jit
def _whole(number, KIND: tl.constexpr, LOOKUP: tl.constexpr):
    """A whole number from 0 to 15 in type KIND; by "bits" with a constant added to it.

    The constants are the powers of two from which on the type's numbers are 1 apart.
    """
    if LOOKUP == "cast":
        value = number.to(KIND)
    elif tl.bfloat16 == KIND:
        value = (number.to(tl.uint16) | 0x4300).to(KIND, bitcast=True)
    elif tl.float16 == KIND:
        value = (number.to(tl.uint16) | 0x6400).to(KIND, bitcast=True)
    else:
        value = (number.to(tl.uint32) | 0x4B000000).to(KIND, bitcast=True)
    return value


@triton.jit
def _value(code, zero, table, KIND: tl.constexpr, LOOKUP: tl.constexpr):
    """What a code stands for, scale apart, in type KIND."""
    if LOOKUP == "table":
        value = tl.load(table + code.to(tl.int32), eviction_policy="evict_last").to(KIND)
    elif LOOKUP == "tree":
        one, two = (code & 1) != 0, (code & 2) != 0
        four, eight = (code & 4) != 0, (code & 8) != 0
        a = tl.where(one, -0.6961928009986877, -1.0)
        b = tl.where(one, -0.39491748809814453, -0.5250730514526367)
        c = tl.where(one, -0.18477343022823334, -0.28444138169288635)
        d = tl.where(one, 0.0, -0.09105003625154495)
        negative = tl.where(four, tl.where(two, d, c), tl.where(two, b, a))
        a = tl.where(one, 0.16093020141124725, 0.07958029955625534)
        b = tl.where(one, 0.33791524171829224, 0.24611230194568634)
        c = tl.where(one, 0.5626170039176941, 0.44070982933044434)
        d = tl.where(one, 1.0, 0.7229568362236023)
        positive = tl.where(four, tl.where(two, d, c), tl.where(two, b, a))
        value = tl.where(eight, positive, negative).to(KIND)
    else:
        value = _whole(code, KIND, LOOKUP) - _whole(zero, KIND, LOOKUP)
    return value


@triton.jit
def _pair(x, at, mask):
    """Elements 2 at and 2 at + 1 of x: what the halves of byte ``at`` are multiplied with.

    Two 16-bit numbers come in one load; both stay in the thread that has the byte.
    """
    kind = x.dtype.element_ty
    if kind.primitive_bitwidth == 16:
        both = tl.load(x.to(tl.pointer_type(tl.uint32)) + at, mask=mask, other=0)
        even = both.to(tl.uint16).to(kind, bitcast=True)
        odd = (both >> 16).to(tl.uint16).to(kind, bitcast=True)
    else:
        even = tl.load(x + 2 * at, mask=mask, other=0.0)
        odd = tl.load(x + 2 * at + 1, mask=mask, other=0.0)
    return even, odd


@triton.jit
def _of_block(scales, zeros, at, real):
    """Scale and zero of the blocks ``at``."""
    scale = tl.load(scales + at, mask=real, other=0.0)
    if zeros is None:
        zero = tl.full(scale.shape, _MIDDLE, tl.uint8)
    else:
        zero = tl.load(zeros + at, mask=real, other=0)
    return scale, zero


@triton.jit
def _turn(
    codes,
    scales,
    zeros,
    at_scale,
    turn,
    real,
    PIECES: tl.constexpr,
    LENGTH: tl.constexpr,
    EACH: tl.constexpr,
):
    """Codes of a tile of features in all pieces of a turn, and the pieces' scales and zeros."""
    piece = tl.arange(0, PIECES)
    byte = piece[:, None] * (LENGTH // 2) + tl.arange(0, LENGTH // 2)[None, :]
    packed = tl.load(
        codes[:, :, None] + turn * (PIECES * LENGTH // 2) + byte[None, :, :],
        mask=real[:, None, None],
        other=0,
        eviction_policy="evict_first",
    )
    block = at_scale + ((turn * PIECES + piece) // EACH)[None, :]
    scale, zero = _of_block(scales, zeros, block, real[:, None])
    return packed, scale, zero


# Any number of rows is one binary: a step with a new number compiles nothing.
@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x,
    codes,
    scales,
    zeros,
    table,
    out,
    rows,
    features,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    LENGTH: tl.constexpr,
    PIECES: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    DOT: tl.constexpr,
):
    """PIECES of LENGTH columns a turn, at once for a row, one after another for a tile of rows."""
    feature = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    split = tl.program_id(2)
    real = feature < features
    codes += feature.to(tl.int64)[:, None] * (COLUMNS // 2)
    at_scale = feature.to(tl.int64) * SCALES
    EACH: tl.constexpr = BLOCK // LENGTH  # pieces of one scale
    turns: tl.constexpr = COLUMNS // (LENGTH * PIECES)
    part: tl.constexpr = (turns + SPLITS - 1) // SPLITS
    start, stop = split * part, tl.minimum(split * part + part, turns)
    byte = tl.arange(0, LENGTH // 2)
    if TILE_ROWS == 0:
        row = tl.program_id(1).to(tl.int64)
        byte = tl.arange(0, PIECES)[:, None] * (LENGTH // 2) + byte[None, :]
        at_scale = at_scale[:, None]
        acc = tl.zeros([TILE_OUT, PIECES, LENGTH // 2], tl.float32)
        # The next turn's weights are on their way while this one's are multiplied.
        ahead = tl.minimum(start, turns - 1)
        packed, scale, zero = _turn(
            codes, scales, zeros, at_scale, ahead, real, PIECES, LENGTH, EACH
        )
        for turn in range(start, stop):
            ahead = tl.minimum(turn + 1, turns - 1)
            coming, coming_scale, coming_zero = _turn(
                codes, scales, zeros, at_scale, ahead, real, PIECES, LENGTH, EACH
            )
            at = row * (COLUMNS // 2) + turn * (PIECES * LENGTH // 2) + byte
            even, odd = _pair(x, at, at >= 0)
            even, odd = even.to(tl.float32)[None, :, :], odd.to(tl.float32)[None, :, :]
            high = _value(packed >> 4, zero[:, :, None], table, DOT, LOOKUP)
            low = _value(packed & 15, zero[:, :, None], table, DOT, LOOKUP)
            acc += (high * even + low * odd) * scale[:, :, None]
            packed, scale, zero = coming, coming_scale, coming_zero
        y = tl.sum(tl.sum(acc, 2), 1)
        tl.store(out + (split * rows + row) * features + feature, y.to(out.dtype.element_ty), real)
    else:
        row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        of_x = row.to(tl.int64)[:, None] * (COLUMNS // 2) + byte[None, :]
        acc = tl.zeros([TILE_OUT, TILE_ROWS], tl.float32)
        for turn in range(start, stop):
            for i in tl.static_range(PIECES):
                piece = turn * PIECES + i
                at = codes + piece * (LENGTH // 2) + byte[None, :]
                packed = tl.load(at, mask=real[:, None], other=0, eviction_policy="evict_first")
                scale, zero = _of_block(scales, zeros, at_scale + piece // EACH, real)
                even, odd = _pair(x, of_x + piece * (LENGTH // 2), (row < rows)[:, None])
                high = _value(packed >> 4, zero[:, None], table, DOT, LOOKUP)
                low = _value(packed & 15, zero[:, None], table, DOT, LOOKUP)
                # The weights are the first operand: those of few rows are best on its side.
                sums = tl.dot(high, tl.trans(even.to(DOT)), input_precision="ieee")
                sums = tl.dot(low, tl.trans(odd.to(DOT)), sums, input_precision="ieee")
                acc += sums * scale[:, None]
        place = (split * rows + row).to(tl.int64)[None, :] * features + feature[:, None]
        inside = real[:, None] & (row < rows)[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(parts, out, count, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = at < count
    total = tl.load(parts + at, mask=inside, other=0.0)
    for _ in range(1, SPLITS):
        parts += count
        total += tl.load(parts + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dense_kernel(
    codes,
    scales,
    zeros,
    table,
    out,
    features,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
    LENGTH: tl.constexpr,
    TILE_OUT: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """LENGTH columns of TILE_OUT features a program: value and scale multiplied in float32."""
    feature = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    piece = tl.program_id(1)
    real = feature < features
    wide = feature.to(tl.int64)
    byte = piece * (LENGTH // 2) + tl.arange(0, LENGTH // 2)
    at = codes + wide[:, None] * (COLUMNS // 2) + byte[None, :]
    packed = tl.load(at, mask=real[:, None], other=0, eviction_policy="evict_first")
    scale, zero = _of_block(scales, zeros, wide * SCALES + piece // (BLOCK // LENGTH), real)
    high = _value(packed >> 4, zero[:, None], table, tl.float32, LOOKUP) * scale[:, None]
    low = _value(packed & 15, zero[:, None], table, tl.float32, LOOKUP) * scale[:, None]
    both = tl.interleave(high, low)
    place = wide[:, None] * COLUMNS + piece * LENGTH + tl.arange(0, LENGTH)[None, :]
    tl.store(out + place, both.to(out.dtype.element_ty), mask=real[:, None])
