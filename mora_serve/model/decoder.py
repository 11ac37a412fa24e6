"""The decoder of the Llama shape, over a flat batch of tokens.

One file covers Llama 2/3, Mistral, Qwen2/2.5 and Qwen3: RMSNorm, rotary positions with their
scaling variants, grouped-query attention, SwiGLU, optional biases and q/k norms, tied embeddings.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mora_serve.model.attention import Attention
from mora_serve.model.passes import rms_norm, rotate, swiglu
from mora_serve.model.quant import Linear, Table, Weight
from mora_serve.model.shape import ModelShape
from mora_serve.model.shard import SUMMED, Group, Shard


class Adapters(Protocol):
    """What a batch adds to the base: the mixture of each of its rows."""

    def apply(self, layer: int, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Add the adapters' deltas to y = Wx [tokens, out], bias apart; x is [tokens, in].

        May write into y; the result is what counts.
        """
        ...


@dataclass(slots=True)
class Layer:
    """One transformer layer; ``sites`` holds the four fused linears by name."""

    input_norm: Tensor
    post_norm: Tensor
    sites: dict[str, Linear]
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens whose last hidden states somebody reads: the last layer leaves the others out.

    ``tokens`` [n] int64, ascending; ``attention`` takes the q of these tokens, k and v of all;
    ``adapters`` are those of these tokens.
    """

    tokens: Tensor
    attention: Attention
    adapters: Adapters | None = None


class Decoder:
    """Embedding, layers, head. All methods are differentiable in the adapters.

    Tied, ``embedding`` and ``head`` are one object. Where a ``group`` of ranks shares the base,
    ``shape`` is that of this rank's ``shard``: layers and head are its parts, the embedding and the
    residual stream are whole.
    """

    def __init__(
        self,
        shape: ModelShape,
        embedding: Table,
        layers: list[Layer],
        norm: Tensor,
        head: Weight,
        inverse_frequencies: Tensor,
        rope_scale: float = 1.0,
        shard: Shard | None = None,
        group: Group | None = None,
    ) -> None:
        self.shape = shape
        self.shard, self.group = shard, group
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.dtype = norm.dtype
        self.device = norm.device
        angles = torch.outer(
            torch.arange(shape.max_positions, device=self.device).float(),
            inverse_frequencies.to(self.device).float(),
        ).repeat(1, 2)
        self.cos = (angles.cos() * rope_scale).to(self.dtype)
        self.sin = (angles.sin() * rope_scale).to(self.dtype)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        adapters: Adapters | None = None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """tokens and positions [T] int64 -> normalised last hidden state [T, hidden].

        With ``wanted`` it is [n, hidden], of these tokens alone.
        """
        h = self.residual(tokens, positions, attention, adapters, wanted=wanted)
        return self._norm(h, self.norm)

    def residual(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        adapters: Adapters | None = None,
        depth: int | None = None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """The residual stream [T, hidden] after the first ``depth`` layers, or after all.

        Not normalised; at depth 0 it is the tokens' embeddings. With ``wanted``, after all layers,
        it is [n, hidden], of these tokens alone.
        """
        s = self.shape
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        h = self.embedding.rows(tokens, self.dtype)
        for i, layer in enumerate(self.layers[:depth]):
            x = self._norm(h, layer.input_norm)
            qkv = self._site(i, "qkv", x, adapters).view(len(x), -1, s.head_dim)
            q, k, v = qkv.tensor_split((s.heads, s.heads + s.kv_heads), dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if wanted is not None and i == s.layers - 1:
                q, h = q[wanted.tokens], h[wanted.tokens]
                attention, adapters = wanted.attention, wanted.adapters
            a = attention(i, q, k, v)
            h = h + self._site(i, "o", a, adapters)
            x = self._norm(h, layer.post_norm)
            x = swiglu(self._site(i, "gate_up", x, adapters))
            h = h + self._site(i, "down", x, adapters)
        return h

    def dense(self) -> Decoder:
        """The same numbers with every 4-bit weight dequantised once, for training in few steps.

        Takes ``shape.linear_parameters`` elements of memory.
        """
        out = copy.copy(self)
        out.layers = [
            replace(layer, sites={n: s.dense(self.dtype) for n, s in layer.sites.items()})
            for layer in self.layers
        ]
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden [T, hidden] -> logits [T, vocabulary] in float32."""
        logits = self.head.matmul(hidden)
        if self.group is not None:
            logits = self.group.join(logits, self.shape.vocab_size)
        return logits.float()

    def _site(self, layer: int, site: str, x: Tensor, adapters: Adapters | None) -> Tensor:
        linear = self.layers[layer].sites[site]
        y = linear.matmul(x)
        if adapters is not None:
            y = adapters.apply(layer, site, x, y)
        if self.group is not None and site in SUMMED:
            y = self.group.sum(y)
        return y if linear.bias is None else y + linear.bias

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.shape.rms_norm_eps)
