"""Shapes of well-known bases by name, for plans without their files: sizes of their config.json."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from mora_serve.errors import ConfigError
from mora_serve.model.files import read_shape
from mora_serve.model.shape import ModelShape, shape_from_config


class _Sizes(NamedTuple):
    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int
    tied: bool = False
    head_dim: int = 128


_SIZES: Mapping[str, _Sizes] = {
    "llama-3.2-1b": _Sizes("llama", 2048, 8192, 16, 32, 8, 128256, 131072, True, 64),
    "llama-3.2-3b": _Sizes("llama", 3072, 8192, 28, 24, 8, 128256, 131072, True),
    "llama-3.1-8b": _Sizes("llama", 4096, 14336, 32, 32, 8, 128256, 131072),
    "llama-3.1-70b": _Sizes("llama", 8192, 28672, 80, 64, 8, 128256, 131072),
    "mistral-7b": _Sizes("mistral", 4096, 14336, 32, 32, 8, 32768, 32768),
    "qwen2.5-0.5b": _Sizes("qwen2", 896, 4864, 24, 14, 2, 151936, 32768, True, 64),
    "qwen2.5-1.5b": _Sizes("qwen2", 1536, 8960, 28, 12, 2, 151936, 32768, True),
    "qwen2.5-3b": _Sizes("qwen2", 2048, 11008, 36, 16, 2, 151936, 32768, True),
    "qwen2.5-7b": _Sizes("qwen2", 3584, 18944, 28, 28, 4, 152064, 32768),
    "qwen2.5-14b": _Sizes("qwen2", 5120, 13824, 48, 40, 8, 152064, 32768),
    "qwen2.5-32b": _Sizes("qwen2", 5120, 27648, 64, 40, 8, 152064, 32768),
    "qwen3-0.6b": _Sizes("qwen3", 1024, 3072, 28, 16, 8, 151936, 40960, True),
    "qwen3-1.7b": _Sizes("qwen3", 2048, 6144, 28, 16, 8, 151936, 40960, True),
    "qwen3-4b": _Sizes("qwen3", 2560, 9728, 36, 32, 8, 151936, 40960, True),
    "qwen3-8b": _Sizes("qwen3", 4096, 12288, 36, 32, 8, 151936, 40960),
    "qwen3-14b": _Sizes("qwen3", 5120, 17408, 40, 40, 8, 151936, 40960),
    "qwen3-32b": _Sizes("qwen3", 5120, 25600, 64, 64, 8, 151936, 40960),
}
KNOWN = tuple(_SIZES)


def known_config(name: str) -> dict[str, object]:
    """The sizes of a known base under the keys of a config.json. KeyError for another name."""
    s = _SIZES[name]
    return {
        "model_type": s.kind,
        "vocab_size": s.vocabulary,
        "hidden_size": s.hidden,
        "intermediate_size": s.inner,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "max_position_embeddings": s.positions,
        "tie_word_embeddings": s.tied,
        "sliding_window": None,
    }


def find_shape(model: str) -> ModelShape:
    """The shape of a known base by its name, or of a directory, a hub id or 'demo'.

    Raises ConfigError, with the nearest known name.
    """
    name = model.lower()
    if name in _SIZES:
        return shape_from_config(known_config(name))
    try:
        return read_shape(model)
    except ConfigError as e:
        near = difflib.get_close_matches(name.rpartition("/")[2], KNOWN, 1)
        if not near:
            raise
        raise ConfigError(
            f"{e.message}; by name {near[0]!r} is known without any file", field="base.model"
        ) from None
