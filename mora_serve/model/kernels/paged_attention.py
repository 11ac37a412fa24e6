"""Attention over pages of keys and values, for decode rows and for chunks of prompts.

The reference is model/attention.py's PagedAttention. Queries that share a key head are folded into
the rows of one product, so that each page is read once a key head. Softmax is in float32. What a
row may not see is never loaded: other requests' pages and what is left in the last page cannot
spread, not even as NaN.

A row's result depends on its own tokens alone, bit by bit: where a decode row is split follows from
its length and a constant number of splits, and the parts are put together in their order
(flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mora_serve.model.kernels.operands import dot_type

TILE = 64  # keys at a time
SPLIT = 128  # keys that are worth a split of their own
SPLITS = 32  # at most


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Room for the parts of split rows: ``parts`` [rows, heads, splits, dim] and, of each, the
    largest score and the sum of weights, both [rows, heads, splits]; all float32."""

    parts: Tensor
    top: Tensor
    total: Tensor

    @classmethod
    def of(
        cls, rows: int, heads: int, dim: int, longest: int, device: torch.device
    ) -> DecodeScratch:
        """For up to ``rows`` rows of up to ``longest`` keys: tables of that many tokens."""
        splits = max(1, min(SPLITS, triton.cdiv(longest, SPLIT)))
        shape = (rows, heads, splits)
        parts, top, total = (
            torch.zeros(size, dtype=torch.float32, device=device)
            for size in ((*shape, dim), shape, shape)
        )
        return cls(parts, top, total)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    window: int | None,
    out: Tensor,
    scratch: DecodeScratch,
) -> None:
    """Fill out [n, heads, dim] with the attention of single-token rows; q is like out.

    keys and values [kv_heads, pages, page_size, dim] are one layer's; table [n, pages] int32 the
    rows' pages; lengths [n] int32 their tokens including this step's. A row of length 0, as pads
    a CUDA graph's bucket, gets zeros. The grid depends on shapes alone. q, out and table are
    contiguous, keys and values within a head.
    """
    rows, heads, dim = q.shape
    kv_heads, _, page_size, _ = keys.shape
    splits = scratch.top.shape[2]
    sizes = {"DIM": dim, "COLUMNS": triton.next_power_of_2(dim)}
    bounds = {"WINDOW": window or 0, "SPLITS": splits, "LEAST": SPLIT // TILE, "TILE": TILE}
    _decode_kernel[(rows, kv_heads, splits)](
        q,
        keys,
        values,
        table,
        lengths,
        out,
        scratch.parts,
        scratch.top,
        scratch.total,
        dim**-0.5 * math.log2(math.e),
        table.stride(0),
        keys.stride(0),
        HEADS=heads,
        GROUP=heads // kv_heads,
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
        PAGE=page_size,
        DOT=dot_type(q.dtype),
        num_warps=4,
        num_stages=3,
        **sizes,
        **bounds,
    )
    if splits > 1:
        _combine_kernel[(rows, heads)](
            lengths,
            scratch.parts,
            scratch.top,
            scratch.total,
            out,
            HEADS=heads,
            ROOM=triton.next_power_of_2(splits),
            num_warps=4,
            **sizes,
            **bounds,
        )


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    contexts: Tensor,
    lengths: Tensor,
    longest: int,
    window: int | None,
    out: Tensor,
) -> None:
    """Causal attention of several chunks of prompts, whose keys are in their pages already.

    Chunk c has rows starts[c] to starts[c] + lengths[c] of q and out [T, heads, dim]; contexts[c]
    tokens come before it; table [chunks, pages] int32 are its pages. All int32; ``longest`` bounds
    the lengths and, with the shapes, decides the grid. A chunk of length 0 is nothing, and rows of
    no chunk are left as they are. keys and values as in ``decode_attention``.
    """
    chunks = len(lengths)
    _, heads, dim = q.shape
    kv_heads, _, page_size, _ = keys.shape
    group = heads // kv_heads
    columns = triton.next_power_of_2(dim)
    rows = 64 if columns > 128 or longest * group <= 64 else 128
    tile = TILE if columns <= 128 else TILE // 2
    if q.dtype == torch.float32:  # without tensor cores larger ones do not fit in registers
        rows = 32 if columns <= 64 else 16
        tile //= 2
    _prefill_kernel[(triton.cdiv(longest * group, rows), kv_heads, chunks)](
        q,
        keys,
        values,
        table,
        starts,
        contexts,
        lengths,
        out,
        dim**-0.5 * math.log2(math.e),
        table.stride(0),
        keys.stride(0),
        HEADS=heads,
        GROUP=group,
        DIM=dim,
        COLUMNS=columns,
        PAGE=page_size,
        WINDOW=window or 0,
        ROWS=rows,
        TILE=tile,
        DOT=dot_type(q.dtype),
        num_warps=8 if rows * columns > 8192 else 4,
        num_stages=2,
    )


@triton.jit
def _share(
    length,
    split,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first visible key of a row, and the keys that a split of it reads."""
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    first = low // TILE
    tiles = tl.cdiv(length, TILE) - first
    each = tl.maximum(tl.cdiv(tiles, SPLITS), LEAST)
    start = (first + split * each) * TILE
    return low, start, tl.minimum(start + each * TILE, length)


@triton.jit
def _places(table, key, exists, column, DIM: tl.constexpr, PAGE: tl.constexpr):
    """Where in a head's pages the keys of a sequence lie, by its ``table``, and a mask of them."""
    page = tl.load(table + key // PAGE, mask=exists, other=0)
    place = page.to(tl.int64) * PAGE + key % PAGE
    there = place[:, None] * DIM + column[None, :]
    return there, exists[:, None] & (column < DIM)[None, :]


@triton.jit
def _scores(queries, keys, inside, scale, DOT: tl.constexpr):
    k = tl.load(keys, mask=inside, other=0.0)
    return tl.dot(queries.to(DOT), tl.trans(k.to(DOT)), input_precision="ieee") * scale


@triton.jit
def _added(top, total, acc, scores, values, inside, DOT: tl.constexpr):
    """The running softmax with a tile of keys more: highest score, sum of weights, of values."""
    higher = tl.maximum(top, tl.max(scores, 1))
    # Of a row that has seen no key yet, all scores are -inf: its weights shall be 0.
    base = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    v = tl.load(values, mask=inside, other=0.0)
    total = total * shrink + tl.sum(weights, 1)
    rounded = weights.to(v.dtype).to(DOT)
    acc = acc * shrink[:, None] + tl.dot(rounded, v.to(DOT), input_precision="ieee")
    return higher, total, acc


@triton.jit
def _decode_kernel(
    q,
    keys,
    values,
    table,
    lengths,
    out,
    parts,
    tops,
    totals,
    scale,
    table_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    low, start, stop = _share(length, split, WINDOW, SPLITS, LEAST, TILE)
    member = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    head = row * HEADS + kv_head * GROUP + member
    real = (member < GROUP)[:, None] & (column < DIM)[None, :]
    if start < stop:
        queries = tl.load(q + head[:, None] * DIM + column[None, :], mask=real, other=0.0)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        table_row = table + row * table_stride
        of_head = kv_head * head_stride
        for at in range(start, stop, TILE):
            key = at + tl.arange(0, TILE)
            seen = (key >= low) & (key < stop)
            there, inside = _places(table_row, key, seen, column, DIM, PAGE)
            scores = _scores(queries, keys + of_head + there, inside, scale, DOT)
            scores = tl.where(seen[None, :], scores, -float("inf"))
            top, total, acc = _added(top, total, acc, scores, values + of_head + there, inside, DOT)
        if SPLITS == 1:
            result = (acc / total[:, None]).to(out.dtype.element_ty)
            tl.store(out + head[:, None] * DIM + column[None, :], result, mask=real)
        else:
            part = head * SPLITS + split
            tl.store(parts + part[:, None] * DIM + column[None, :], acc, mask=real)
            tl.store(tops + part, top, mask=member < GROUP)
            tl.store(totals + part, total, mask=member < GROUP)
    elif SPLITS == 1:
        nothing = tl.zeros([ROWS, COLUMNS], out.dtype.element_ty)
        tl.store(out + head[:, None] * DIM + column[None, :], nothing, mask=real)


@triton.jit
def _combine_kernel(
    lengths,
    parts,
    tops,
    totals,
    out,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROOM: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = row * HEADS + tl.program_id(1)
    split = tl.arange(0, ROOM)
    column = tl.arange(0, COLUMNS)
    length = tl.load(lengths + row)
    _, start, stop = _share(length, split, WINDOW, SPLITS, LEAST, TILE)
    used = (start < stop) & (split < SPLITS)
    part = head * SPLITS + split
    tops_ = tl.load(tops + part, mask=used, other=-float("inf"))
    totals_ = tl.load(totals + part, mask=used, other=0.0)
    weight = tl.where(used, tl.exp2(tops_ - tl.max(tops_, 0)), 0.0)
    inside = used[:, None] & (column < DIM)[None, :]
    accs = tl.load(parts + part[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    result = tl.sum(accs * weight[:, None], 0) / tl.sum(totals_ * weight, 0)
    result = tl.where(length > 0, result, 0.0).to(out.dtype.element_ty)
    tl.store(out + head * DIM + column, result, mask=column < DIM)


# Of a step these are what comes after its decode rows: wherever they begin, it is one binary.
@triton.jit(do_not_specialize_on_alignment=["table", "starts", "contexts", "lengths"])
def _prefill_kernel(
    q,
    keys,
    values,
    table,
    starts,
    contexts,
    lengths,
    out,
    scale,
    table_stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DOT: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    kv_head = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + chunk)
    if first < length * GROUP:
        context = tl.load(contexts + chunk)
        member = first + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        query = member // GROUP  # of the chunk
        position = context + query
        token = tl.load(starts + chunk).to(tl.int64) + query
        at_query = token * HEADS + kv_head * GROUP + member % GROUP
        at_query = at_query[:, None] * DIM + column[None, :]
        real = (query < length)[:, None] & (column < DIM)[None, :]
        queries = tl.load(q + at_query, mask=real, other=0.0)
        stop = context + tl.minimum((first + ROWS - 1) // GROUP + 1, length)
        low = 0
        if WINDOW > 0:
            low = tl.maximum(context + first // GROUP - WINDOW + 1, 0)
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        table_row = table + chunk * table_stride
        of_head = kv_head * head_stride
        for at in range(low // TILE * TILE, stop, TILE):
            key = at + tl.arange(0, TILE)
            exists = (key >= low) & (key < stop)
            there, inside = _places(table_row, key, exists, column, DIM, PAGE)
            scores = _scores(queries, keys + of_head + there, inside, scale, DOT)
            seen = exists[None, :] & (key[None, :] <= position[:, None])
            if WINDOW > 0:
                seen = seen & (position[:, None] - key[None, :] < WINDOW)
            scores = tl.where(seen, scores, -float("inf"))
            top, total, acc = _added(top, total, acc, scores, values + of_head + there, inside, DOT)
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + at_query, result, mask=real)
