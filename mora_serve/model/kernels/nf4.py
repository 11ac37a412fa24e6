"""y = x W^T for few rows, straight from NF4 codes; the reference is model/quant.py's NF4Weight.

A byte holds two weights of a row, the first in its high half; a weight is its code's value times
the absmax of its block (QLoRA, https://arxiv.org/abs/2305.14314, appendix E). Two kernels: a row at
a time in float32 without tensor cores, for one row or a few, and tiles of rows by tl.dot, where the
codes' values are rounded to x's type and absmax is applied in float32 after each block's product.
The input dimension can be split over programs; the parts are summed in their order, so that a plan
gives the same bits each time, and a row's do not depend on the other rows.

Whether a plan beats bitsandbytes only a card can tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mora_serve.model.kernels.operands import dot_type
from mora_serve.model.quant import NF4Weight

# bitsandbytes' order of the codes.
VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
MOST_ROWS = 256  # that it is meant for; more are better served by dequantising once
PROGRAMS = 264  # that the default plan aims at: two for each of an H100's processors
LONGEST_TILE = 128  # columns that one tl.dot takes


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut.

    ``tile_rows`` 0 is the row kernel, otherwise the rows of x in a tile; ``tile_out`` output
    features in a tile; ``blocks`` quantisation blocks a turn; ``splits`` programs that share the
    input dimension. ``lookup`` finds a code's value in a "table" in memory or by a "tree" of
    selections.
    """

    tile_rows: int
    tile_out: int
    blocks: int
    splits: int
    lookup: str = "table"
    warps: int = 4
    stages: int = 3


def default_plan(rows: int, out: int, columns: int, lookup: str = "table") -> Plan:
    """A plan from sizes alone, none of which was measured on a card yet."""
    if rows == 1:
        # 512 bytes of a feature a turn: enough loads on their way to keep a card's memory busy
        # without splits, whose sum would be a launch more.
        tile_rows, tile_out, blocks = 0, 4, 16
        programs = triton.cdiv(out, tile_out)
    else:
        tile_rows = min(max(triton.next_power_of_2(rows), 16), 64)
        tile_out, blocks = 64, 2
        programs = triton.cdiv(out, tile_out) * triton.cdiv(rows, tile_rows)
    useful = max(columns // 1024, 1)  # so that a part is worth its sum
    splits = triton.next_power_of_2(max(min(PROGRAMS // programs, useful, 16), 1))
    return Plan(tile_rows, tile_out, blocks, splits, lookup)


class NF4Product:
    """The product on one device for x of one type."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.values = torch.tensor(VALUES, dtype=torch.float32, device=device)
        self.rounded = self.values.to(dtype)

    def __call__(
        self, x: Tensor, weight: NF4Weight, plan: Plan, out: Tensor | None = None
    ) -> Tensor:
        """x [rows, in], contiguous -> x @ W.T [rows, out]; ``out`` is filled when given."""
        rows, columns = x.shape
        features = weight.shape[0]
        if out is None:
            out = x.new_empty(rows, features)
        parts = out
        if plan.splits > 1:
            parts = x.new_empty(plan.splits, rows, features, dtype=torch.float32)
        shape = {"COLUMNS": columns, "BLOCK": columns // weight.absmax.shape[1]}
        cut = {"TILE_OUT": plan.tile_out, "SPLITS": plan.splits, "LOOKUP": plan.lookup}
        launch = {"num_warps": plan.warps, "num_stages": plan.stages}
        tiles = triton.cdiv(features, plan.tile_out)
        if plan.tile_rows:
            length = min(shape["BLOCK"], LONGEST_TILE)
            _tile_kernel[(tiles, triton.cdiv(rows, plan.tile_rows), plan.splits)](
                x,
                weight.codes,
                weight.absmax,
                self.rounded,
                parts,
                rows,
                features,
                LENGTH=length,
                STEPS=_fitting(plan.blocks, columns // length),
                TILE_ROWS=plan.tile_rows,
                DOT=dot_type(x.dtype),
                **shape,
                **cut,
                **launch,
            )
        else:
            _row_kernel[(tiles, rows, plan.splits)](
                x,
                weight.codes,
                weight.absmax,
                self.values,
                parts,
                rows,
                features,
                BLOCKS=_fitting(plan.blocks, weight.absmax.shape[1]),
                **shape,
                **cut,
                **launch,
            )
        if plan.splits > 1:
            grid = (triton.cdiv(rows * features, 1024),)
            _sum_kernel[grid](parts, out, rows * features, SPLITS=plan.splits, SIZE=1024)
        return out


def _fitting(wanted: int, count: int) -> int:
    """The largest power of two up to ``wanted`` that divides ``count``."""
    return min(wanted, count & -count)


@triton.jit
def _value(code, table, LOOKUP: tl.constexpr):
    if LOOKUP == "table":
        value = tl.load(table + code.to(tl.int32), eviction_policy="evict_last")
    else:
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
        value = tl.where(eight, positive, negative)
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
def _weights(of_codes, of_absmax, turn, real, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Codes and absmax of a tile of features in the blocks of one turn."""
    packed = tl.load(
        of_codes + turn * (BLOCKS * BLOCK // 2),
        mask=real[:, None, None],
        other=0,
        eviction_policy="evict_first",
    )
    return packed, tl.load(of_absmax + turn * BLOCKS, mask=real[:, None], other=0.0)


# Any number of rows is one binary: a step with a new number compiles nothing.
@triton.jit(do_not_specialize=["rows"])
def _row_kernel(
    x,
    codes,
    absmax,
    table,
    out,
    rows,
    features,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    SPLITS: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    feature = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    real = feature < features
    block = tl.arange(0, BLOCKS)
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    wide = feature.to(tl.int64)
    of_codes = codes + wide[:, None, None] * (COLUMNS // 2) + byte[None, :, :]
    of_absmax = absmax + wide[:, None] * (COLUMNS // BLOCK) + block[None, :]
    acc = tl.zeros([TILE_OUT, BLOCKS, BLOCK // 2], tl.float32)
    turns: tl.constexpr = COLUMNS // (BLOCK * BLOCKS)
    each: tl.constexpr = (turns + SPLITS - 1) // SPLITS
    # The next turn's weights are on their way while this one's are multiplied.
    ahead = tl.minimum(split * each, turns - 1)
    packed, scale = _weights(of_codes, of_absmax, ahead, real, BLOCK, BLOCKS)
    for turn in range(split * each, tl.minimum(split * each + each, turns)):
        ahead = tl.minimum(turn + 1, turns - 1)
        coming, coming_scale = _weights(of_codes, of_absmax, ahead, real, BLOCK, BLOCKS)
        at = row * (COLUMNS // 2) + turn * (BLOCKS * BLOCK // 2) + byte
        even, odd = _pair(x, at, at >= 0)
        even, odd = even.to(tl.float32)[None, :, :], odd.to(tl.float32)[None, :, :]
        high = _value(packed >> 4, table, LOOKUP)
        low = _value(packed & 15, table, LOOKUP)
        acc += (high * even + low * odd) * scale[:, :, None]
        packed, scale = coming, coming_scale
    y = tl.sum(tl.sum(acc, 2), 1)
    target = out + (split * rows + row) * features + feature
    tl.store(target, y.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def _tile_kernel(
    x,
    codes,
    absmax,
    table,
    out,
    rows,
    features,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
    STEPS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    LOOKUP: tl.constexpr,
    DOT: tl.constexpr,
):
    feature = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    split = tl.program_id(2)
    real = feature < features
    byte = tl.arange(0, LENGTH // 2)
    of_codes = codes + feature.to(tl.int64)[:, None] * (COLUMNS // 2) + byte[None, :]
    of_absmax = absmax + feature.to(tl.int64) * (COLUMNS // BLOCK)
    of_x = row.to(tl.int64)[:, None] * (COLUMNS // 2) + byte[None, :]
    acc = tl.zeros([TILE_OUT, TILE_ROWS], tl.float32)
    turns: tl.constexpr = COLUMNS // (LENGTH * STEPS)
    each: tl.constexpr = (turns + SPLITS - 1) // SPLITS
    for turn in range(split * each, tl.minimum(split * each + each, turns)):
        for step in tl.static_range(STEPS):
            start = (turn * STEPS + step) * LENGTH
            packed = tl.load(
                of_codes + start // 2, mask=real[:, None], other=0, eviction_policy="evict_first"
            )
            scale = tl.load(of_absmax + start // BLOCK, mask=real, other=0.0)
            even, odd = _pair(x, of_x + start // 2, (row < rows)[:, None])
            high = _value(packed >> 4, table, LOOKUP).to(DOT)
            low = _value(packed & 15, table, LOOKUP).to(DOT)
            # The weights are the first operand: those of few rows are best on its side.
            part = tl.dot(high, tl.trans(even.to(DOT)), input_precision="ieee")
            part = tl.dot(low, tl.trans(odd.to(DOT)), part, input_precision="ieee")
            acc += part * scale[:, None]
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
