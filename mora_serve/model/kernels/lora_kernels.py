"""The Triton kernels of the mixed adapter product; mixed_lora.py launches them.

Shrink computes an entry's inner products A x, cut along x into ``SPLITS`` partial sums of CHUNK
columns that are kept apart in float32; expand adds them up in their order, applies scales and the
row's weights, multiplies with B and adds the deltas of a row's adapters to y in the order of its
mixture. Nothing is added atomically, so a run repeats bit for bit, and a row's numbers do not
depend on what else is in the batch. Programs take work from the table (see mixtures.py) in turns,
so that a grid of a fixed size does any step.

Each is compiled in two forms: for TILE_ROWS 1 vector products of one row, otherwise products of
matrices of so many rows, whose operands are in type OPERAND. With EARLY a launch overlaps the end
of the one before (programmatic dependent launch, from Hopper on): it reads the table, then waits
for that one's results.
Loops over the rank stop at the adapter's own. Layout: a [slots, max_rank, columns], b [slots,
max_rank, width], scale [slots, max_rank] of int8 slots, inner [projection, entry, split, max_rank].
"""

from __future__ import annotations

import triton
import triton.language as tl

from mora_serve.model.kernels import mixtures as _m

SHRINK_TILES = tl.constexpr(_m.SHRINK_TILES)
EXPAND_TILES = tl.constexpr(_m.EXPAND_TILES)
ENTRY_ROW = tl.constexpr(_m.ENTRY_ROW)
SHRINK_SLOT = tl.constexpr(_m.SHRINK_SLOT)
SHRINK_FIRST = tl.constexpr(_m.SHRINK_FIRST)
SHRINK_COUNT = tl.constexpr(_m.SHRINK_COUNT)
SHRINK_RANK = tl.constexpr(_m.SHRINK_RANK)
EXPAND_FIRST = tl.constexpr(_m.EXPAND_FIRST)
EXPAND_COUNT = tl.constexpr(_m.EXPAND_COUNT)
ROW = tl.constexpr(_m.ROW)
ROW_ADAPTERS = tl.constexpr(_m.ROW_ADAPTERS)
MIXTURE = tl.constexpr(_m.MIXTURE)
PER_ADAPTER = tl.constexpr(_m.PER_ADAPTER)
ENTRY = tl.constexpr(_m.ENTRY)
SLOT = tl.constexpr(_m.SLOT)
WEIGHT = tl.constexpr(_m.WEIGHT)
FACTS = tl.constexpr(_m.FACTS)


@triton.jit
def _items(table, COUNT: tl.constexpr, each, EARLY: tl.constexpr):
    """``each`` items for every tile that the header counts; then what the last launch computed."""
    items = tl.load(table + COUNT) * each
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    return items


@triton.jit
def shrink(
    x,
    x_stride,
    a0,
    a1,
    a2,
    inner,
    table,
    columns,
    entries,
    max_rank,
    PROJECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    STRIDE: tl.constexpr,
    EARLY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One tile of entries, one projection, one chunk of x an item; of one row it is the entry."""
    items = _items(table, SHRINK_TILES, PROJECTIONS * SPLITS, EARLY)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = item % SPLITS
        projection = (item // SPLITS) % PROJECTIONS
        tile = item // (SPLITS * PROJECTIONS)
        record = table + (1 + tile) * STRIDE
        slot = tl.load(record + SHRINK_SLOT).to(tl.int64)
        rank = tl.load(record + SHRINK_RANK)
        a = a0
        if projection == 1:
            a = a1
        if projection == 2:
            a = a2
        a += slot * max_rank * columns
        end = tl.minimum(columns, (split + 1) * CHUNK)
        sums_of = inner + split.to(tl.int64) * max_rank
        if TILE_ROWS == 1:
            row = tl.load(record + ENTRY_ROW).to(tl.int64)
            k = split * CHUNK + tl.arange(0, BLOCK)
            inside = k < end
            values = tl.load(x + row * x_stride + k, mask=inside, other=0).to(tl.float32)
            out = sums_of + ((projection * entries + tile) * SPLITS).to(tl.int64) * max_rank
            for r0 in range(0, rank, RANKS):
                r = r0 + tl.arange(0, RANKS)
                mask = (r < rank)[:, None] & inside[None, :]
                weights = tl.load(a + r[:, None] * columns + k[None, :], mask=mask, other=0)
                sums = tl.sum(weights.to(tl.float32) * values[None, :], axis=1)
                tl.store(out + r, sums, mask=r < rank)
        else:
            m = tl.arange(0, TILE_ROWS)
            live = m < tl.load(record + SHRINK_COUNT)
            entry = tl.load(record + SHRINK_FIRST) + m
            row = tl.load(table + (1 + entry) * STRIDE + ENTRY_ROW, mask=live, other=0).to(tl.int64)
            out = sums_of + ((projection * entries + entry) * SPLITS).to(tl.int64) * max_rank
            for r0 in range(0, rank, RANKS):
                r = r0 + tl.arange(0, RANKS)
                sums = tl.zeros([TILE_ROWS, RANKS], tl.float32)
                for k0 in range(split * CHUNK, end, BLOCK):
                    k = k0 + tl.arange(0, BLOCK)
                    inside = k < end
                    mask = live[:, None] & inside[None, :]
                    values = tl.load(x + row[:, None] * x_stride + k[None, :], mask=mask, other=0)
                    mask = inside[:, None] & (r < rank)[None, :]
                    weights = tl.load(a + r[None, :] * columns + k[:, None], mask=mask, other=0)
                    values, weights = values.to(OPERAND), weights.to(OPERAND)
                    sums = tl.dot(values, weights, sums, input_precision="ieee")
                mask = live[:, None] & (r < rank)[None, :]
                tl.store(out[:, None] + r[None, :], sums, mask=mask)


@triton.jit
def expand(
    y,
    y_stride,
    b0,
    b1,
    b2,
    scale0,
    scale1,
    scale2,
    dora0,
    dora1,
    dora2,
    width0,
    width1,
    width2,
    inner,
    table,
    entries,
    max_rank,
    SCALED: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    STRIDE: tl.constexpr,
    EARLY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One tile of rows with one list of slots, BLOCK outputs of one projection an item."""
    blocks0, blocks1 = tl.cdiv(width0, BLOCK), tl.cdiv(width1, BLOCK)
    blocks = blocks0 + blocks1 + tl.cdiv(width2, BLOCK)
    items = _items(table, EXPAND_TILES, blocks, EARLY)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = item % blocks
        # The first record has the list of slots; each row's own its entries and weights.
        first = table + (1 + item // blocks) * STRIDE
        if TILE_ROWS == 1:
            records = first
            row = tl.load(records + ROW).to(tl.int64)
        else:
            m = tl.arange(0, TILE_ROWS)
            live = m < tl.load(first + EXPAND_COUNT)
            first = table + (1 + tl.load(first + EXPAND_FIRST)) * STRIDE
            records = first + m * STRIDE
            row = tl.load(records + ROW, mask=live, other=0).to(tl.int64)
        adapters = tl.load(first + ROW_ADAPTERS)
        b, scale, dora, width, start, projection = b0, scale0, dora0, width0, 0, 0
        if block >= blocks0 + blocks1:
            b, scale, dora, width, projection = b2, scale2, dora2, width2, 2
            block -= blocks0 + blocks1
            start = width0 + width1
        elif block >= blocks0:
            b, scale, dora, width, projection = b1, scale1, dora1, width1, 1
            block -= blocks0
            start = width0
        n = block * BLOCK + tl.arange(0, BLOCK)
        inside = n < width
        if TILE_ROWS == 1:
            at, here = y + row * y_stride + start + n, inside
        else:
            at = y + row[:, None] * y_stride + start + n[None, :]
            here = live[:, None] & inside[None, :]
        total = tl.load(at, mask=here, other=0).to(tl.float32)
        for j in range(adapters):
            adapter = MIXTURE + PER_ADAPTER * j
            slot = tl.load(first + adapter + SLOT).to(tl.int64)
            if TILE_ROWS == 1:
                entry = tl.load(records + adapter + ENTRY)
                weight = tl.load(records + adapter + WEIGHT).to(tl.float32, bitcast=True)
            else:
                entry = tl.load(records + adapter + ENTRY, mask=live, other=0)
                weight = tl.load(records + adapter + WEIGHT, mask=live, other=0)
                weight = weight.to(tl.float32, bitcast=True)[:, None]
            facts = tl.load(first + adapter + FACTS)
            rank = facts // 2
            matrix = b + slot * max_rank * width
            sums = inner + ((projection * entries + entry) * SPLITS).to(tl.int64) * max_rank
            delta = tl.zeros_like(total)
            for r0 in range(0, rank, RANKS):
                r = r0 + tl.arange(0, RANKS)
                if TILE_ROWS == 1:
                    split = tl.arange(0, SPLITS_UP)
                    mask = (split < SPLITS)[:, None] & (r < rank)[None, :]
                    parts = sums + split[:, None] * max_rank + r[None, :]
                    h = tl.sum(tl.load(parts, mask=mask, other=0), axis=0)
                else:
                    mask = live[:, None] & (r < rank)[None, :]
                    h = tl.zeros([TILE_ROWS, RANKS], tl.float32)
                    for split in range(SPLITS):
                        parts = sums[:, None] + split * max_rank + r[None, :]
                        h += tl.load(parts, mask=mask, other=0)
                if SCALED:
                    h *= tl.load(scale + slot * max_rank + r, mask=r < rank, other=0)
                mask = (r < rank)[:, None] & inside[None, :]
                weights = tl.load(matrix + r[:, None] * width + n[None, :], mask=mask, other=0)
                if TILE_ROWS == 1:
                    delta += tl.sum(h[:, None] * weights.to(tl.float32), axis=0)
                else:
                    h, weights = h.to(OPERAND), weights.to(OPERAND)
                    delta = tl.dot(h, weights, delta, input_precision="ieee")
            delta *= weight
            if (facts & 1) != 0:  # y is read anew: few steps need it, and registers are scarce
                base = tl.load(at, mask=here, other=0).to(tl.float32)
                c = tl.load(dora + slot * width + n, mask=inside, other=0).to(tl.float32)
                delta += c * (delta + weight * base)
            total += delta
        tl.store(at, total.to(y.dtype.element_ty), mask=here)
