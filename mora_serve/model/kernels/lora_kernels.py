"""The Triton kernels of the mixed adapter product; mixed_lora.py launches them.

Shrink computes an entry's inner products A x, cut along x into ``SPLITS`` partial sums of CHUNK
columns that are kept apart in float32; expand adds them up in their order, applies scales and the
row's weights, multiplies with B and adds the deltas of a row's adapters to y in the order of its
mixture. Nothing is added atomically, so a run repeats bit for bit, and a row's numbers do not
depend on what else is in the batch. Programs take work from the table (see mixtures.py) in turns,
so that a grid of a fixed size does any step.

``*_rows`` are vector products of one row, ``*_tiles`` products of matrices of TILE_ROWS rows.
With EARLY a launch overlaps the end of the one before (programmatic dependent launch, from Hopper
on): it reads the table, then waits for that one's results.
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
def shrink_rows(
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
):
    """One entry, one projection, one chunk of x an item; tiles are single entries."""
    items = tl.load(table + SHRINK_TILES) * (PROJECTIONS * SPLITS)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = item % SPLITS
        projection = (item // SPLITS) % PROJECTIONS
        entry = item // (SPLITS * PROJECTIONS)
        record = table + (1 + entry) * STRIDE
        row = tl.load(record + ENTRY_ROW).to(tl.int64)
        slot = tl.load(record + SHRINK_SLOT).to(tl.int64)
        rank = tl.load(record + SHRINK_RANK)
        a = a0
        if projection == 1:
            a = a1
        if projection == 2:
            a = a2
        a += slot * max_rank * columns
        k = split * CHUNK + tl.arange(0, BLOCK)
        inside = k < tl.minimum(columns, (split + 1) * CHUNK)
        values = tl.load(x + row * x_stride + k, mask=inside, other=0).to(tl.float32)
        out = inner + ((projection * entries + entry) * SPLITS + split).to(tl.int64) * max_rank
        for r0 in range(0, rank, RANKS):
            r = r0 + tl.arange(0, RANKS)
            mask = (r < rank)[:, None] & inside[None, :]
            weights = tl.load(a + r[:, None] * columns + k[None, :], mask=mask, other=0)
            sums = tl.sum(weights.to(tl.float32) * values[None, :], axis=1)
            tl.store(out + r, sums, mask=r < rank)


@triton.jit
def expand_rows(
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
):
    """One row, BLOCK outputs of one projection an item."""
    blocks0, blocks1 = tl.cdiv(width0, BLOCK), tl.cdiv(width1, BLOCK)
    blocks = blocks0 + blocks1 + tl.cdiv(width2, BLOCK)
    items = tl.load(table + EXPAND_TILES) * blocks
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = item % blocks
        record = table + (1 + item // blocks) * STRIDE
        row = tl.load(record + ROW).to(tl.int64)
        adapters = tl.load(record + ROW_ADAPTERS)
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
        at = y + row * y_stride + start + n
        total = tl.load(at, mask=inside, other=0).to(tl.float32)
        split = tl.arange(0, SPLITS_UP)
        for j in range(adapters):
            adapter = record + MIXTURE + PER_ADAPTER * j
            entry = tl.load(adapter + ENTRY)
            slot = tl.load(adapter + SLOT).to(tl.int64)
            weight = tl.load(adapter + WEIGHT).to(tl.float32, bitcast=True)
            facts = tl.load(adapter + FACTS)
            rank = facts // 2
            sums = inner + ((projection * entries + entry) * SPLITS).to(tl.int64) * max_rank
            matrix = b + slot * max_rank * width
            delta = tl.zeros([BLOCK], tl.float32)
            for r0 in range(0, rank, RANKS):
                r = r0 + tl.arange(0, RANKS)
                mask = (split < SPLITS)[:, None] & (r < rank)[None, :]
                parts = tl.load(sums + split[:, None] * max_rank + r[None, :], mask=mask, other=0)
                h = tl.sum(parts, axis=0)
                if SCALED:
                    h *= tl.load(scale + slot * max_rank + r, mask=r < rank, other=0)
                mask = (r < rank)[:, None] & inside[None, :]
                weights = tl.load(matrix + r[:, None] * width + n[None, :], mask=mask, other=0)
                delta += tl.sum(h[:, None] * weights.to(tl.float32), axis=0)
            delta *= weight
            if (facts & 1) != 0:  # y is read anew: few steps need it, and registers are scarce
                base = tl.load(at, mask=inside, other=0).to(tl.float32)
                c = tl.load(dora + slot * width + n, mask=inside, other=0).to(tl.float32)
                delta += c * (delta + weight * base)
            total += delta
        tl.store(at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def shrink_tiles(
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
    """One tile of entries, one projection, one chunk of x an item; operands in type OPERAND."""
    items = tl.load(table + SHRINK_TILES) * (PROJECTIONS * SPLITS)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        split = item % SPLITS
        projection = (item // SPLITS) % PROJECTIONS
        record = table + (1 + item // (SPLITS * PROJECTIONS)) * STRIDE
        slot = tl.load(record + SHRINK_SLOT).to(tl.int64)
        rank = tl.load(record + SHRINK_RANK)
        m = tl.arange(0, TILE_ROWS)
        live = m < tl.load(record + SHRINK_COUNT)
        entry = tl.load(record + SHRINK_FIRST) + m
        row = tl.load(table + (1 + entry) * STRIDE + ENTRY_ROW, mask=live, other=0).to(tl.int64)
        a = a0
        if projection == 1:
            a = a1
        if projection == 2:
            a = a2
        a += slot * max_rank * columns
        end = tl.minimum(columns, (split + 1) * CHUNK)
        out = inner + ((projection * entries + entry) * SPLITS + split).to(tl.int64) * max_rank
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
                sums = tl.dot(values.to(OPERAND), weights.to(OPERAND), sums, input_precision="ieee")
            mask = live[:, None] & (r < rank)[None, :]
            tl.store(out[:, None] + r[None, :], sums, mask=mask)


@triton.jit
def expand_tiles(
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
    items = tl.load(table + EXPAND_TILES) * blocks
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        block = item % blocks
        record = table + (1 + item // blocks) * STRIDE
        first = tl.load(record + EXPAND_FIRST)
        m = tl.arange(0, TILE_ROWS)
        live = m < tl.load(record + EXPAND_COUNT)
        leader = table + (1 + first) * STRIDE
        records = table + (1 + first + m) * STRIDE
        row = tl.load(records + ROW, mask=live, other=0).to(tl.int64)
        adapters = tl.load(leader + ROW_ADAPTERS)
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
        at = y + row[:, None] * y_stride + start + n[None, :]
        here = live[:, None] & inside[None, :]
        total = tl.load(at, mask=here, other=0).to(tl.float32)
        for j in range(adapters):
            adapter = MIXTURE + PER_ADAPTER * j
            entry = tl.load(records + adapter + ENTRY, mask=live, other=0)
            slot = tl.load(leader + adapter + SLOT).to(tl.int64)
            weight = tl.load(records + adapter + WEIGHT, mask=live, other=0)
            weight = weight.to(tl.float32, bitcast=True)
            facts = tl.load(leader + adapter + FACTS)
            rank = facts // 2
            sums = inner + ((projection * entries + entry) * SPLITS).to(tl.int64) * max_rank
            matrix = b + slot * max_rank * width
            delta = tl.zeros([TILE_ROWS, BLOCK], tl.float32)
            for r0 in range(0, rank, RANKS):
                r = r0 + tl.arange(0, RANKS)
                mask = live[:, None] & (r < rank)[None, :]
                h = tl.zeros([TILE_ROWS, RANKS], tl.float32)
                for split in range(SPLITS):
                    h += tl.load(sums[:, None] + split * max_rank + r[None, :], mask=mask, other=0)
                if SCALED:
                    h *= tl.load(scale + slot * max_rank + r, mask=r < rank, other=0)[None, :]
                mask = (r < rank)[:, None] & inside[None, :]
                weights = tl.load(matrix + r[:, None] * width + n[None, :], mask=mask, other=0)
                delta = tl.dot(h.to(OPERAND), weights.to(OPERAND), delta, input_precision="ieee")
            delta *= weight[:, None]
            if (facts & 1) != 0:  # as in expand_rows
                base = tl.load(at, mask=here, other=0).to(tl.float32)
                c = tl.load(dora + slot * width + n, mask=inside, other=0).to(tl.float32)
                delta += c[None, :] * (delta + weight[:, None] * base)
            total += delta
        tl.store(at, total.to(y.dtype.element_ty), mask=here)
