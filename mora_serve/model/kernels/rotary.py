"""From the fused q/k/v product to rotated queries and filled KV pages, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mora_serve.model.passes import rms_norm, rotate

HEADS_PER_BLOCK = 4


@dataclass(frozen=True, slots=True)
class Rotary:
    """What a layer does to q, k and v before attention.

    ``cos`` and ``sin`` [positions, dim] are the decoder's tables, both halves alike. ``bias``
    [(heads + 2 kv_heads) * dim] belongs to the fused product; ``q_norm`` and ``k_norm`` [dim] are
    Qwen3's.
    """

    heads: int
    kv_heads: int
    cos: Tensor
    sin: Tensor
    bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0

    def __call__(
        self,
        qkv: Tensor,
        positions: Tensor,
        places: Tensor,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Fill q [T, heads, dim], and keys and values (one layer's pages) at ``places``.

        qkv [T, (heads + 2 kv_heads) * dim], contiguous; positions and places [T] int32 or int64.
        A place is page * page_size + offset; where it is -1 no key or value is written. keys and
        values [kv_heads, pages, page_size, dim] are contiguous within a head.
        """
        dim = q.shape[2]
        total = self.heads + 2 * self.kv_heads
        half = triton.next_power_of_2(dim // 2)
        grid = (qkv.shape[0], triton.cdiv(total, HEADS_PER_BLOCK))
        _rotary_kernel[grid](
            qkv,
            self.bias,
            self.q_norm,
            self.k_norm,
            self.cos,
            self.sin,
            positions,
            places,
            q,
            keys,
            values,
            keys.stride(0),
            self.eps,
            HEADS=self.heads,
            KV_HEADS=self.kv_heads,
            DIM=dim,
            BLOCK=HEADS_PER_BLOCK,
            HALF=half,
            num_warps=1 if HEADS_PER_BLOCK * half <= 256 else 4,
        )

    def reference(
        self,
        qkv: Tensor,
        positions: Tensor,
        places: Tensor,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """The same by torch, op by op."""
        if self.bias is not None:
            qkv = qkv + self.bias
        parts = qkv.view(len(qkv), -1, q.shape[2])
        queries, k, v = parts.tensor_split((self.heads, self.heads + self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            queries = rms_norm(queries, self.q_norm, self.eps)
            k = rms_norm(k, self.k_norm, self.eps)
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        q.copy_(rotate(queries, cos, sin))
        written = torch.nonzero(places >= 0).flatten()
        where = places[written].long()
        keys.flatten(1, 2)[:, where] = rotate(k, cos, sin)[written].transpose(0, 1)
        values.flatten(1, 2)[:, where] = v[written].transpose(0, 1)


@triton.jit
def _rotary_kernel(
    qkv,
    bias,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    places,
    q,
    keys,
    values,
    head_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, HALF)
    kind = q.dtype.element_ty
    half: tl.constexpr = DIM // 2
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < half)[None, :]
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS

    at = head[:, None] * DIM + column[None, :]
    source = qkv + token * ((HEADS + 2 * KV_HEADS) * DIM) + at
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + half, mask=inside, other=0.0)
    if bias is not None:
        b_low = tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
        b_high = tl.load(bias + at + half, mask=inside, other=0.0).to(tl.float32)
        low = (low.to(tl.float32) + b_low).to(kind)
        high = (high.to(tl.float32) + b_high).to(kind)
    raw_low, raw_high = low, high
    if q_norm is not None:
        x, y = low.to(tl.float32), high.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x + y * y, 1) / DIM + eps)[:, None]
        of_query = inside & is_query[:, None]
        of_key = inside & (head >= HEADS)[:, None]
        w_low = tl.load(q_norm + column[None, :], mask=of_query, other=0.0).to(tl.float32)
        w_low += tl.load(k_norm + column[None, :], mask=of_key, other=0.0).to(tl.float32)
        w_high = tl.load(q_norm + half + column[None, :], mask=of_query, other=0.0).to(tl.float32)
        w_high += tl.load(k_norm + half + column[None, :], mask=of_key, other=0.0).to(tl.float32)
        low, high = (x * scale * w_low).to(kind), (y * scale * w_high).to(kind)

    position = tl.load(positions + token).to(tl.int64)
    angle = position * DIM + column
    c = tl.load(cos + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=column < half, other=0.0).to(tl.float32)[None, :]
    x, y = low.to(tl.float32), high.to(tl.float32)
    # Each product is rounded before the sum, as torch does it.
    turned_low = (x * c).to(kind).to(tl.float32) - (y * s).to(kind).to(tl.float32)
    turned_high = (y * c).to(kind).to(tl.float32) + (x * s).to(kind).to(tl.float32)

    to_query = inside & is_query[:, None]
    target = q + token * (HEADS * DIM) + at
    tl.store(target, turned_low.to(kind), mask=to_query)
    tl.store(target + half, turned_high.to(kind), mask=to_query)

    place = tl.load(places + token).to(tl.int64)
    if place >= 0:
        kv_head = ((head - HEADS) % KV_HEADS).to(tl.int64)
        there = kv_head[:, None] * head_stride + place * DIM + column[None, :]
        to_key = inside & (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None]
        tl.store(keys + there, turned_low.to(kind), mask=to_key)
        tl.store(keys + there + half, turned_high.to(kind), mask=to_key)
        to_value = inside & is_value[:, None]
        tl.store(values + there, raw_low, mask=to_value)
        tl.store(values + there + half, raw_high, mask=to_value)
