"""Whole steps compile for a card that is not here; tests/model/kernels looks at more sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu_base import LLAMA, random_decoder
from mora_serve.engine.graphs import Variant
from mora_serve.engine.kernel_step import KernelStep, PromptStep, Room
from mora_serve.model.attention import KVPages
from mora_serve.model.lora import AdapterSlots
from tests.model.kernels.compiling import compiled


@functools.cache
def llama() -> KernelStep:
    """A layer of Llama-3.1-8B without memory: tensors on "meta"."""
    meta = torch.device("meta")
    shape = replace(LLAMA, layers=1)
    decoder = random_decoder(shape, meta, torch.bfloat16)
    slots = AdapterSlots(shape, 32, 16, torch.bfloat16, meta)
    kv = KVPages(1, shape.kv_heads, shape.head_dim, 4096, 16, torch.bfloat16, meta)
    return KernelStep(decoder, slots, kv, Room(8192, 32, 4))  # the 4-bit product compiles elsewhere


def prompts() -> None:
    step = llama()
    step.make_room(4)
    step.run(PromptStep(tokens=4, chunks=2, single=1, longest=3, sampled=1))


LAUNCHES: dict[str, Callable[[], None]] = {
    "decode": lambda: llama().run(Variant(16, 1)),
    "prompts": prompts,
}


def test_every_launch_of_a_step_compiles_as_it_is_specialised_there() -> None:
    for where, kernels in compiled(__name__, list(LAUNCHES), [90]).items():
        assert {"_add_norm_kernel", "_rotary_kernel", "_pick_in_block"} <= {
            kernel.kernel for kernel in kernels
        }, where
        assert [kernel for kernel in kernels if kernel.error] == [], where
