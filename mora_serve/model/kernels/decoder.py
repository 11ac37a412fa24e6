"""The decoder's layers by fused kernels: what model/decoder.py computes, in few launches a layer.

One plain function over the tensors it is given, without a look at their values, so that a CUDA
graph can hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mora_serve.model.attention import KVPages
from mora_serve.model.decoder import Adapters, Decoder, Layer
from mora_serve.model.kernels.activation import swiglu
from mora_serve.model.kernels.norms import add_norm
from mora_serve.model.kernels.rotary import Rotary
from mora_serve.model.quant import Linear
from mora_serve.model.shard import SUMMED

Product = Callable[[Linear, Tensor], Tensor]


class Attend(Protocol):
    """Attention of a step whose keys and values are in their pages."""

    def __call__(self, keys: Tensor, values: Tensor, q: Tensor) -> Tensor:
        """One layer's pages and q [T, heads, dim] -> [T, heads * dim]."""
        ...


class KernelDecoder:
    """Runs a decoder's layers over pages; ``product`` computes x @ W.T of a site."""

    def __init__(self, decoder: Decoder, kv: KVPages, product: Product) -> None:
        self.decoder, self.kv, self.product = decoder, kv, product
        self._rotary = [self._rotary_of(layer) for layer in decoder.layers]

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        places: Tensor,
        attend: Attend,
        adapters: Adapters | None = None,
    ) -> Tensor:
        """Tokens, positions and places [T] int32 -> normalised last hidden state [T, hidden].

        A place is page * page_size + offset; where it is -1 no key or value is kept.
        """
        decoder, shape = self.decoder, self.decoder.shape
        eps, rows = shape.rms_norm_eps, len(tokens)
        h = decoder.embedding.rows(tokens, decoder.dtype)
        x, q = torch.empty_like(h), h.new_empty(rows, shape.heads, shape.head_dim)
        inner = h.new_empty(rows, shape.intermediate_size)
        delta, bias = None, None
        for i, (layer, rotary) in enumerate(zip(decoder.layers, self._rotary, strict=True)):
            keys, values = self.kv.k[i], self.kv.v[i]
            add_norm(h, delta, layer.input_norm, eps, x, bias)
            qkv = self._site(i, layer, "qkv", x, adapters)
            rotary(qkv, positions, places, q, keys, values)
            delta = self._site(i, layer, "o", attend(keys, values, q), adapters)
            add_norm(h, delta, layer.post_norm, eps, x, layer.sites["o"].bias)
            gate_up = self._site(i, layer, "gate_up", x, adapters)
            swiglu(gate_up, inner, layer.sites["gate_up"].bias)
            delta = self._site(i, layer, "down", inner, adapters)
            bias = layer.sites["down"].bias
        add_norm(h, delta, decoder.norm, eps, x, bias)
        return x

    def _site(
        self, index: int, layer: Layer, site: str, x: Tensor, adapters: Adapters | None
    ) -> Tensor:
        """Without the bias, which the next kernel adds."""
        y = self.product(layer.sites[site], x)
        if adapters is not None:
            y = adapters.apply(index, site, x, y)
        group = self.decoder.group
        return group.sum(y) if group is not None and site in SUMMED else y

    def _rotary_of(self, layer: Layer) -> Rotary:
        shape = self.decoder.shape
        return Rotary(
            shape.heads,
            shape.kv_heads,
            self.decoder.cos,
            self.decoder.sin,
            layer.sites["qkv"].bias,
            layer.q_norm,
            layer.k_norm,
            shape.rms_norm_eps,
        )
