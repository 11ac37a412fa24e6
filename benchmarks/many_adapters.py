"""Thousands of different adapters, quickly: copies of a random one, each with a tensor of its own.

Their digests differ, so the server reads, stores and loads each; what a load and a step cost does
not depend on the values.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from mora_serve.adapters.registry import Registry
from mora_serve.adapters.validate import read_upload
from mora_serve.config import AdaptersConfig
from mora_serve.core import DEFAULT_TENANT
from mora_serve.model.shape import PROJECTIONS, ModelShape, projection_path

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Rank and projections of small adapters, by turns; the first has about the mean size, for the most
# popular one is a large share of a Zipf load.
SMALL = ((8, ATTENTION), (8, ("q_proj", "v_proj")), (4, PROJECTIONS))


class Template:
    """Adapters of one rank on the given projections of every layer, in bf16."""

    def __init__(self, shape: ModelShape, rank: int, projections: Sequence[str]) -> None:
        generator = torch.Generator().manual_seed(rank)
        tensors = {}
        for layer, projection in itertools.product(range(shape.layers), projections):
            rows, columns = shape.projection(projection)
            key = f"base_model.model.{projection_path(layer, projection)}"
            a = torch.randn(rank, columns, generator=generator) * columns**-0.5
            b = torch.randn(rows, rank, generator=generator) * 0.01
            tensors[f"{key}.lora_A.weight"] = a.bfloat16()
            tensors[f"{key}.lora_B.weight"] = b.bfloat16()
        self._file = save(tensors)
        own = f"base_model.model.{projection_path(0, projections[0])}.lora_A.weight"
        length = int.from_bytes(self._file[:8], "little")
        start, end = json.loads(self._file[8 : 8 + length])[own]["data_offsets"]
        self._own = slice(8 + length + start, 8 + length + end)
        self.config = json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": 2 * rank,
                "target_modules": sorted(projections),
            }
        ).encode()

    def weights(self, seed: int) -> bytes:
        """The safetensors file of one adapter."""
        file = bytearray(self._file)
        count = (self._own.stop - self._own.start) // 2
        values = np.random.default_rng(seed).standard_normal(count, np.float32) * 0.03
        file[self._own] = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().tobytes()
        return bytes(file)

    def write(self, directory: Path, seed: int) -> None:
        """One adapter as a PEFT directory."""
        directory.mkdir(parents=True)
        (directory / "adapter_config.json").write_bytes(self.config)
        (directory / "adapter_model.safetensors").write_bytes(self.weights(seed))


def names(count: int) -> Iterator[str]:
    """What ``register`` calls the adapters."""
    return (f"a{i}" for i in range(count))


def register(state: Path, shape: ModelShape, count: int, limits: AdaptersConfig) -> int:
    """Fill a server's state directory with ``count`` small adapters; their bytes."""
    templates = [Template(shape, rank, projections) for rank, projections in SMALL]
    size = 0
    with Registry(state, limits, shape) as registry:
        for i, name in enumerate(names(count)):
            template = templates[i % len(templates)]
            weights = template.weights(i)
            adapter = read_upload(template.config, weights, None, shape, limits)
            registry.register(DEFAULT_TENANT, name, adapter)
            size += len(weights)
    return size
