"""Adapters for tests, written without torch: PEFT directories of small random tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mora_serve.adapters.validate import ValidatedAdapter, read_upload
from mora_serve.config import AdaptersConfig
from mora_serve.model.shape import PROJECTIONS, ModelShape, projection_path

SHAPE = ModelShape(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_positions=128,
    rms_norm_eps=1e-6,
)
LIMITS = AdaptersConfig()


def key(layer: int, projection: str, part: str) -> str:
    return f"base_model.model.{projection_path(layer, projection)}.lora_{part}"


def tensors(
    rank: int = 4,
    projections: Iterable[str] = PROJECTIONS,
    layers: Iterable[int] = range(SHAPE.layers),
    dora: bool = False,
    seed: int = 0,
    dtype: Any = np.float32,
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {}
    for layer in layers:
        for p in projections:
            rows, columns = SHAPE.projection(p)
            out[key(layer, p, "A.weight")] = rng.normal(size=(rank, columns)).astype(dtype)
            out[key(layer, p, "B.weight")] = rng.normal(size=(rows, rank)).astype(dtype)
            if dora:
                out[key(layer, p, "magnitude_vector")] = rng.random(rows).astype(dtype)
    return out


def config(rank: int = 4, **changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none"} | changes


def files(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[bytes, bytes]:
    return json.dumps(config).encode(), safetensors.numpy.save(dict(tensors))


def adapter(
    seed: int = 0, rank: int = 4, limits: AdaptersConfig = LIMITS, **changes: Any
) -> ValidatedAdapter:
    data = files(config(rank, **changes), tensors(rank, ("q_proj",), seed=seed))
    return read_upload(*data, None, SHAPE, limits)


def directory(path: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    path.mkdir(parents=True)
    config_bytes, weights = files(config, tensors)
    (path / "adapter_config.json").write_bytes(config_bytes)
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def container(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
