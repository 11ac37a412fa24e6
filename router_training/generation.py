"""Greedy answers of many prompts at once, for evaluation."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.model.decoder import Decoder
from mora_serve.model.stacked import StackedAdapters
from router_training.batches import chunks


class CachedCausal:
    """Causal attention that keeps the keys and values of a fixed number of rows.

    Set ``positions`` [rows, n] before each pass of rows * n tokens. What a padding token wrote
    is masked until the row's own token of that position replaces it.
    """

    def __init__(self, decoder: Decoder, rows: int, length: int) -> None:
        shape = decoder.shape
        size = (shape.layers, rows, length, shape.kv_heads, shape.head_dim)
        self._keys = torch.zeros(size, dtype=decoder.dtype)
        self._values = torch.zeros(size, dtype=decoder.dtype)
        self._window = shape.sliding_window
        self.positions = torch.zeros(rows, 0, dtype=torch.long)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See mora_serve.model.attention.Attention."""
        rows, new = self.positions.shape
        row = torch.arange(rows)[:, None]
        for cache, value in ((self._keys, k), (self._values, v)):
            cache[layer, row, self.positions] = value.view(rows, new, *value.shape[1:])
        at = torch.arange(self._keys.shape[2])
        back = self.positions[:, None, :, None] - at
        seen = back >= 0
        if self._window is not None:
            seen &= back < self._window
        out = F.scaled_dot_product_attention(
            q.view(rows, new, *q.shape[1:]).transpose(1, 2),
            self._keys[layer].transpose(1, 2),
            self._values[layer].transpose(1, 2),
            attn_mask=seen,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.transpose(1, 2).reshape(q.shape[0], -1)


@torch.no_grad()
def greedy(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    end: Collection[int],
    limit: int,
    adapters: StackedAdapters | None = None,
    weights: Tensor | None = None,
    rows: int = 96,
) -> list[list[int]]:
    """The most likely continuation of each prompt, at most ``limit`` tokens, no end token.

    ``weights`` [prompts, adapters] holds each prompt's mixture.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for group in chunks(by_length, rows):
        chosen = None if weights is None else weights[torch.tensor(group)]
        found = _greedy_group(decoder, [prompts[i] for i in group], end, limit, adapters, chosen)
        for i, answer in zip(group, found, strict=True):
            answers[i] = answer
    return answers


def _greedy_group(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    end: Collection[int],
    limit: int,
    adapters: StackedAdapters | None,
    weights: Tensor | None,
) -> list[list[int]]:
    lengths = torch.tensor([len(p) for p in prompts])
    longest = int(lengths.max())
    attention = CachedCausal(decoder, len(prompts), longest + limit)

    def best(ids: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        attention.positions = positions
        mixture = None
        if adapters is not None and weights is not None:
            mixture = adapters.mix(weights, ids.shape[1])
        hidden = decoder.hidden(ids.flatten(), positions.flatten(), attention, mixture)
        return decoder.logits(hidden.view(*ids.shape, -1)[torch.arange(len(ids)), last]).argmax(-1)

    padded = torch.tensor([[*p, *([0] * (longest - len(p)))] for p in prompts])
    token = best(padded, torch.arange(longest).expand(len(prompts), -1), lengths - 1)
    columns = [token]
    ended = torch.tensor(sorted(end), dtype=torch.long)
    done = torch.isin(token, ended)
    for n in range(limit - 1):
        if done.all():
            break
        token = best(token[:, None], (lengths + n)[:, None], torch.zeros_like(lengths))
        columns.append(token)
        done |= torch.isin(token, ended)
    return [_before_end(row, end) for row in torch.stack(columns, 1).tolist()]


def _before_end(tokens: list[int], end: Collection[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in end:
            return tokens[:i]
    return tokens
