"""The Llama shape: what a base model's sizes are, read from its Hugging Face configuration.

No torch here, so that the adapter validator can check shapes without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mora_serve.errors import ConfigError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

# One fused 4-bit product each; adapters stay per projection inside a site.
SITES: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PROJECTIONS = tuple(p for projections in SITES.values() for p in projections)


def projection_path(layer: int, projection: str) -> str:
    """The Hugging Face module path of a projection, e.g. model.layers.0.self_attn.q_proj."""
    block = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{projection}"


class ProjectionSizes(Protocol):
    """What of a base an adapter has to fit."""

    @property
    def layers(self) -> int:
        """How many layers it has."""
        ...

    def projection(self, name: str) -> tuple[int, int]:
        """(rows out, columns in) of a projection's weight."""
        ...


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of one base model.

    ``rope`` holds transformers' rope parameters (``rope_type``, ``rope_theta``, and what the
    type needs). The ``*_bias`` switches say which projections carry a bias. ``sliding_window`` is
    None where attention is full.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None

    def projection(self, name: str) -> tuple[int, int]:
        """(rows out, columns in) of a projection's weight. KeyError for an unknown name."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, f = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (q, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, q),
            "gate_proj": (f, h),
            "up_proj": (f, h),
            "down_proj": (h, f),
        }[name]

    @property
    def linear_parameters(self) -> int:
        """Parameters of all projections of all layers (biases apart)."""
        return self.layers * sum(math.prod(self.projection(p)) for p in PROJECTIONS)

    @property
    def table_parameters(self) -> int:
        """Parameters of the embedding and, where it is another matrix, the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def norm_parameters(self) -> int:
        """Parameters of the norms: two a layer, those of queries and keys, and the last."""
        heads = 2 * self.head_dim if self.qk_norm else 0
        return self.layers * (2 * self.hidden_size + heads) + self.hidden_size

    @property
    def bias_parameters(self) -> int:
        """Parameters of all projections' biases."""
        biased = {"qkv": self.qkv_bias, "o": self.o_bias}
        names = [p for s, ps in SITES.items() if biased.get(s, self.mlp_bias) for p in ps]
        return self.layers * sum(self.projection(p)[0] for p in names)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, as its files count them."""
        return (
            self.linear_parameters
            + self.table_parameters
            + self.norm_parameters
            + self.bias_parameters
        )

    def adapter_parameters(self, rank: int, targets: Iterable[str] = PROJECTIONS) -> int:
        """Parameters of A and B of one adapter on ``targets`` of all layers."""
        return self.layers * rank * sum(sum(self.projection(p)) for p in targets)


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read a Hugging Face ``config.json``.

    Raises ConfigError for an architecture other than the supported ones, or for a switch that
    the decoder does not implement; KeyError, TypeError or ValueError for a size that is missing
    or not a number.
    """
    kind = str(config.get("model_type", ""))
    if kind not in SUPPORTED:
        raise ConfigError(
            f"base.model: architecture {kind or 'unknown'!r} is not supported; "
            f"use one of {', '.join(SUPPORTED)}",
            field="base.model",
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"base.model: hidden_act {config['hidden_act']!r} is not supported; only 'silu' is",
            field="base.model",
        )
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    layers = int(config["num_hidden_layers"])
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", float(config.get("rope_theta", 10000.0)))
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial is not None and float(partial) != 1:
        raise ConfigError(
            f"base.model: partial_rotary_factor {partial} is not supported; only 1 is",
            field="base.model",
        )
    attention_bias = kind in ("llama", "qwen3") and bool(config.get("attention_bias", False))
    return ModelShape(
        model_type=kind,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(config["intermediate_size"]),
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        max_positions=int(config["max_position_embeddings"]),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        qkv_bias=kind == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=kind == "llama" and bool(config.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        sliding_window=_sliding_window(config, kind, layers),
    )


def _sliding_window(config: Mapping[str, Any], kind: str, layers: int) -> int | None:
    """The window of all layers; transformers' defaults stand in for keys that are not there."""
    window = config.get("sliding_window", 4096)
    if kind == "llama" or window is None:
        return None
    if kind.startswith("qwen"):
        if not config.get("use_sliding_window", False):
            return None
        first = int(config.get("max_window_layers", 28))
        slides = [i >= first for i in range(layers)]
        if config.get("layer_types") is not None:
            slides = [str(t) == "sliding_attention" for t in config["layer_types"]]
        if not any(slides):
            return None
        if not all(slides):
            raise ConfigError(
                "base.model: sliding windows on only some layers are not supported; "
                "set use_sliding_window to false in its configuration",
                field="base.model",
            )
    return int(window)
