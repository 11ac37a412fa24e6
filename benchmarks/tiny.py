"""Small valid adapters without torch, for measurements of the intake and of the registry."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mora_serve.adapters.validate import ValidatedAdapter, read_upload
from mora_serve.config import AdaptersConfig
from mora_serve.model.shape import ModelShape, projection_path

SHAPE = ModelShape(
    model_type="llama",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    max_positions=128,
    rms_norm_eps=1e-6,
)
LIMITS = AdaptersConfig()


def config(rank: int = 2, **changes: object) -> bytes:
    """An ``adapter_config.json``."""
    return json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4} | changes).encode()


def weights(
    seed: int = 0,
    rank: int = 2,
    projections: Sequence[str] = ("q_proj",),
    dtype: str = "F32",
    dora: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """An ``adapter_model.safetensors``."""
    rng = np.random.default_rng(seed)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for layer in range(SHAPE.layers):
        for projection in projections:
            rows, columns = SHAPE.projection(projection)
            parts: dict[str, tuple[int, ...]] = {
                "A.weight": (rank, columns),
                "B.weight": (rows, rank),
            }
            if dora:
                parts["magnitude_vector"] = (rows,)
            for part, shape in parts.items():
                values = _values(rng.standard_normal(shape, np.float32), dtype)
                header[f"base_model.model.{projection_path(layer, projection)}.lora_{part}"] = {
                    "dtype": dtype,
                    "shape": shape,
                    "data_offsets": [len(data), len(data) + len(values)],
                }
                data += values
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def adapter(seed: int, rank: int = 2) -> ValidatedAdapter:
    """A content of its own for each seed."""
    return read_upload(config(rank), weights(seed, rank), None, SHAPE, LIMITS)


def _values(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.dtype("<u2")).tobytes()
    return values.astype(np.dtype("<f2" if dtype == "F16" else "<f4")).tobytes()
