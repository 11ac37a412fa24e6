"""The decoder in bfloat16 against itself in float32."""

from __future__ import annotations

import pytest
import torch

from benchmarks.families import make_base
from mora_serve.config import BaseConfig
from mora_serve.model.attention import DenseCausal
from mora_serve.model.loading import load_base
from mora_serve.model.lora import AdapterSlots, PooledAdapters, plan_mixtures

LENGTH = 24
MIXTURES = [((0, 0.7), (1, 0.5)), ((1, 1.0),), ((2, -0.5), (0, 1.0)), ()]  # slot 1 is DoRA


def filled_slots(shape, dtype) -> AdapterSlots:
    generator = torch.Generator().manual_seed(1)
    slots = AdapterSlots(shape, 3, 8, dtype, torch.device("cpu"))
    slots.ranks, slots.has_dora = [8, 8, 8], [False, True, False]
    for part in slots.parts():
        part.a.copy_(torch.randn(part.a.shape, generator=generator) * part.a.shape[2] ** -0.5)
        part.b.copy_(torch.randn(part.b.shape, generator=generator) * 0.1)
        part.dora[1] = torch.rand(part.width, generator=generator) * 0.2 - 0.1
    return slots


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("bf16")
    make_base("qwen2", path)
    return path


def logits(directory, quantization, dtype, mixtures) -> torch.Tensor:
    base = load_base(BaseConfig(str(directory), "main", quantization, dtype, "cpu"))
    slots = filled_slots(base.shape, base.decoder.dtype)
    plan = plan_mixtures(slots, mixtures, [LENGTH] * len(mixtures))
    adapters = None if plan is None else PooledAdapters(slots, plan)
    ids = torch.randint(
        2, 320, (len(mixtures) * LENGTH,), generator=torch.Generator().manual_seed(0)
    )
    positions = torch.arange(LENGTH).repeat(len(mixtures))
    with torch.no_grad():
        hidden = base.decoder.hidden(ids, positions, DenseCausal(len(mixtures), LENGTH), adapters)
        return base.decoder.logits(hidden)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bf16_logits_with_mixtures_and_dora_are_near_those_of_fp32(directory, quantization):
    """Every row, with adapters or without, is within 3e-2 relative of float32.

    The adapters change the logits by far more than that, so leaving them out would show.
    """
    want = logits(directory, quantization, "fp32", MIXTURES).unflatten(0, (-1, LENGTH))
    got = logits(directory, quantization, "bf16", MIXTURES).unflatten(0, (-1, LENGTH))
    assert got.dtype == torch.float32
    plain = logits(directory, quantization, "fp32", [()] * 4).unflatten(0, (-1, LENGTH))
    for row in range(4):
        size = want[row].norm()
        assert (got[row] - want[row]).norm() < 3e-2 * size
        if MIXTURES[row]:
            assert (plain[row] - want[row]).norm() > 0.2 * size
