"""Attention over a flat batch of tokens: dense for training, packed for pooling, paged for serving.

The decoder calls ``attention(layer, q, k, v)`` with q [tokens, heads, dim] and k, v
[tokens, kv_heads, dim], already rotated, and gets [tokens, heads * dim]. Query groups are folded
into the query length, so that grouped-query attention is a plain batched product.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.model.memory import Arena


class Attention(Protocol):
    """What the decoder needs of an attention."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, dim], k and v [T, kv_heads, dim] -> [T, heads * dim]."""
        ...


class DenseCausal:
    """Causal attention in a batch of right-padded rows: tokens are [batch * length]."""

    def __init__(self, batch: int, length: int, window: int | None = None) -> None:
        self.batch, self.length = batch, length
        self.mask: Tensor | None = None
        if window is not None and window < length:
            i = torch.arange(length)
            self.mask = (i[:, None] >= i) & (i[:, None] - i < window)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Attention."""
        rows = (self.batch, self.length)
        out = F.scaled_dot_product_attention(
            q.view(*rows, *q.shape[1:]).transpose(1, 2),
            k.view(*rows, *k.shape[1:]).transpose(1, 2),
            v.view(*rows, *v.shape[1:]).transpose(1, 2),
            attn_mask=None if self.mask is None else self.mask.to(q.device),
            is_causal=self.mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2).reshape(q.shape[0], -1)


class SomeQueries:
    """DenseCausal for the queries of some tokens: [n] of [batch * length], ascending."""

    def __init__(self, tokens: Tensor, batch: int, length: int, window: int | None = None) -> None:
        self.batch, self.length = batch, length
        row, at = tokens // length, tokens % length
        first = torch.searchsorted(row, torch.arange(batch, device=row.device))
        place = torch.arange(len(row), device=row.device) - first[row]
        # Queries of one row side by side; places that a row does not fill repeat a real query.
        width = int(place.max()) + 1 if len(place) else 0
        self.padded = torch.zeros(batch, width, dtype=torch.long, device=row.device)
        self.padded[row, place] = torch.arange(len(row), device=row.device)
        self.valid = row * width + place
        back = at[self.padded][..., None] - torch.arange(length, device=row.device)
        seen = back >= 0
        if window is not None:
            seen &= back < window
        self.mask = seen[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [n, heads, dim], k and v [batch * length, kv_heads, dim] -> [n, heads * dim]."""
        rows = (self.batch, self.length)
        out = F.scaled_dot_product_attention(
            q[self.padded].transpose(1, 2),
            k.view(*rows, *k.shape[1:]).transpose(1, 2),
            v.view(*rows, *v.shape[1:]).transpose(1, 2),
            attn_mask=self.mask,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2).flatten(0, 1)[self.valid].flatten(1)


class PackedCausal:
    """Causal attention of texts laid end to end, ``lengths`` their tokens; each sees itself alone.

    A text's result depends on its own tokens only: nothing is padded to another's length. Tokens
    after the last text are padding and get zeros.
    """

    def __init__(
        self, lengths: Sequence[int], group: int, window: int | None, device: torch.device
    ) -> None:
        masks = {n: prefill_mask(0, n, group, window, device) for n in set(lengths)}
        self.spans: list[tuple[slice, Tensor]] = []
        start = 0
        for n in lengths:
            self.spans.append((slice(start, start + n), masks[n]))
            start += n

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Attention."""
        out = torch.zeros_like(q)
        for rows, mask in self.spans:
            keys, values = k[rows].transpose(0, 1), v[rows].transpose(0, 1)
            out[rows] = _folded(q[rows], keys, values, mask)
        return out.flatten(1)


class KVPages:
    """Keys and values of all layers in pages: [layers, kv_heads, pages, page_size, dim].

    Page 0 is never written: it stays zero and pads page tables.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        dim: int,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, kv_heads, pages, page_size, dim)
        arena = Arena()
        self.k, self.v = (arena.zeros(shape, dtype, device) for _ in range(2))
        self.page_size = page_size

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages, so that nothing that their last owner left behind is ever read."""
        index = torch.tensor(list(pages), device=self.k.device)
        self.k[:, :, index] = 0
        self.v[:, :, index] = 0


@dataclass(frozen=True, slots=True)
class Prefill:
    """One chunk of a prompt: ``rows`` of the flat batch, ``context`` tokens before it."""

    rows: slice
    context: int
    table: Tensor  # [pages] int64
    mask: Tensor  # [group * chunk, context + chunk] bool


class PagedAttention:
    """Attention of one step: ``decodes`` single-token rows first, then prompt chunks.

    ``slots`` [tokens] is where each token's key and value go (page * page_size + offset);
    ``table`` [decodes, pages] the page tables of the decode rows, padded with page 0;
    ``lengths`` [decodes] their tokens including this step's.
    """

    def __init__(
        self,
        kv: KVPages,
        slots: Tensor,
        table: Tensor,
        lengths: Tensor,
        prefills: Sequence[Prefill],
        window: int | None = None,
    ) -> None:
        self.kv, self.slots, self.table, self.prefills = kv, slots, table, prefills
        self.decodes = lengths.shape[0]
        position = torch.arange(table.shape[1] * kv.page_size, device=lengths.device)
        hidden = position >= lengths[:, None]
        if window is not None:
            hidden |= position < lengths[:, None] - window
        bias = torch.zeros(hidden.shape, device=lengths.device)
        self.bias = bias.masked_fill_(hidden, -math.inf)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Attention."""
        keys, values = self.kv.k[layer], self.kv.v[layer]
        keys.flatten(1, 2).index_copy_(1, self.slots, k.transpose(0, 1))
        values.flatten(1, 2).index_copy_(1, self.slots, v.transpose(0, 1))
        out = torch.empty_like(q)
        if self.decodes:
            out[: self.decodes] = self._decode(keys, values, q[: self.decodes])
        for chunk in self.prefills:
            out[chunk.rows] = self._prefill(keys, values, q[chunk.rows], chunk)
        return out.flatten(1)

    def _decode(self, keys: Tensor, values: Tensor, q: Tensor) -> Tensor:
        n, heads, dim = q.shape
        kv_heads = keys.shape[0]
        k = keys[:, self.table].flatten(2, 3)  # [kv_heads, n, length, dim]
        v = values[:, self.table].flatten(2, 3)
        grouped = q.view(n, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        # In float32: scores rounded to bfloat16 would lose digits that prefill keeps.
        scores = torch.matmul(grouped.float() * dim**-0.5, k.transpose(2, 3).float())
        weights = torch.softmax(scores + self.bias[:, None], dim=-1)
        return torch.matmul(weights.to(v.dtype), v).transpose(0, 1).reshape(n, heads, dim)

    def _prefill(self, keys: Tensor, values: Tensor, q: Tensor, chunk: Prefill) -> Tensor:
        length = chunk.context + len(q)
        k = keys[:, chunk.table].flatten(1, 2)[:, :length]
        v = values[:, chunk.table].flatten(1, 2)[:, :length]
        return _folded(q, k, v, chunk.mask)


def _folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [n, heads, dim], k and v [kv_heads, length, dim], mask [group * n, length] -> like q."""
    n, heads, dim = q.shape
    kv_heads = k.shape[0]
    grouped = q.view(n, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    # Four dimensions: the fused CPU kernel takes no other number.
    out = F.scaled_dot_product_attention(
        grouped.flatten(1, 2)[None], k[None], v[None], attn_mask=mask
    )
    return out[0].view(kv_heads, -1, n, dim).permute(2, 0, 1, 3).reshape(n, heads, dim)


def prefill_mask(
    context: int, length: int, group: int, window: int | None, device: torch.device
) -> Tensor:
    """Which keys each folded query may see: [group * length, context + length] bool."""
    query = torch.arange(context, context + length, device=device)[:, None]
    key = torch.arange(context + length, device=device)
    mask = key <= query
    if window is not None:
        mask &= query - key < window
    return mask.repeat(group, 1)
