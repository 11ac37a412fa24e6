"""The decoder of the Llama shape, over a flat batch of tokens.

One file covers Llama 2/3, Mistral, Qwen2/2.5 and Qwen3: RMSNorm, rotary positions with their
scaling variants, grouped-query attention, SwiGLU, optional biases and q/k norms, tied embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.model.attention import Attention
from mora_serve.model.quant import Linear, product
from mora_serve.model.shape import ModelShape


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


class Decoder:
    """Embedding, layers, head. All methods are differentiable in the adapters."""

    def __init__(
        self,
        shape: ModelShape,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        head: Tensor,
        inverse_frequencies: Tensor,
        rope_scale: float = 1.0,
    ) -> None:
        self.shape = shape
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.dtype = embedding.dtype
        self.device = embedding.device
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
    ) -> Tensor:
        """tokens and positions [T] int64 -> normalised last hidden state [T, hidden]."""
        s = self.shape
        cos, sin = self.cos[positions][:, None], self.sin[positions][:, None]
        h = F.embedding(tokens, self.embedding)
        for i, layer in enumerate(self.layers):
            x = self._norm(h, layer.input_norm)
            qkv = self._site(i, "qkv", x, adapters).view(len(x), -1, s.head_dim)
            q, k, v = qkv.tensor_split((s.heads, s.heads + s.kv_heads), dim=1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            a = attention(i, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
            h = h + self._site(i, "o", a, adapters)
            x = self._norm(h, layer.post_norm)
            gate, up = self._site(i, "gate_up", x, adapters).chunk(2, dim=-1)
            h = h + self._site(i, "down", F.silu(gate) * up, adapters)
        return self._norm(h, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden [T, hidden] -> logits [T, vocabulary] in float32."""
        return product(hidden, self.head).float()

    def _site(self, layer: int, site: str, x: Tensor, adapters: Adapters | None) -> Tensor:
        linear = self.layers[layer].sites[site]
        y = linear.matmul(x)
        if adapters is not None:
            y = adapters.apply(layer, site, x, y)
        return y if linear.bias is None else y + linear.bias

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.shape.rms_norm_eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
