"""Slots in 8 bits: rounding, what a file's numbers become, and memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.model import footprint
from mora_serve.model.int8_slots import LEVELS, Int8Slots, quantise_rows
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.shape import ModelShape

SHAPE = ModelShape("llama", 32, 40, 72, 2, 4, 2, 11, 64, 1e-6)
MAX_RANK = 16
CPU = torch.device("cpu")


def test_quantised_rows_are_off_by_half_a_step_at_most() -> None:
    rows = torch.randn(3, 4, 50) * torch.logspace(-3, 3, 4)[:, None]
    rows[0, 0] = 0
    numbers, scale = quantise_rows(rows)
    assert numbers.dtype == torch.int8
    assert (numbers.float() * scale[..., None] - rows).abs().le(scale[..., None] * 0.501).all()
    assert numbers.abs().amax(-1).eq(LEVELS).sum() == 11
    rows[1, 1, 7] = float("nan")
    assert quantise_rows(rows)[1].isfinite().logical_not().nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("least", [1e-45, 3e-43, 1e-38])
def test_numbers_too_small_for_a_step_do_not_turn_over(least: float) -> None:
    """Half of the least float32 has no 127th: its sign must stay all the same."""
    numbers, _ = quantise_rows(torch.tensor([[least, -least, 2 * least]]))
    assert (numbers.sign() * torch.tensor([1, -1, 1]) >= 0).all()


@given(st.integers(1, MAX_RANK), st.floats(1e-4, 1e4), st.integers(0, 1 << 30))
def test_what_is_encoded_is_read_back_within_the_bound(rank: int, size: float, seed: int) -> None:
    """Of A and B each number is off by half a step of its row; so much their product may be."""
    generator = torch.Generator().manual_seed(seed)
    part = Int8Slots(SHAPE, 3, MAX_RANK, torch.float32, CPU).projection(1, "k_proj")
    a, b = (torch.randn(rank, n, generator=generator) for n in (40, 22))
    b *= size
    rows = [torch.empty(rank, *t.shape[2:], dtype=t.dtype) for t in part.tensors]

    def read(to_a: torch.Tensor, to_b: torch.Tensor) -> None:
        to_a.copy_(a)
        to_b.copy_(b)

    part.encode(rows, read)
    for tensor, own in zip(part.tensors, rows, strict=True):
        tensor[1, :rank] = own
    got_a, got_b = part.factors(1, rank, torch.float32)
    step_a, step_b = (x.abs().amax(1, keepdim=True) / (2 * LEVELS) for x in (a, b))
    bound = (a.abs() + step_a).T @ (b.abs() + step_b) - a.abs().T @ b.abs()
    assert ((got_a.T @ got_b - a.T @ b).abs() <= bound * 1.001 + 1e-6 * size).all()
    every_a, every_b = part.factors(slice(0, 3), rank, torch.float32)
    assert torch.equal(every_a[1], got_a)
    assert torch.equal(every_b[1], got_b)
    assert not every_a[0].any()
    assert not every_b[2].any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["a", "b"])
def test_what_is_not_finite_is_not_finite_afterwards(wrong: float, where: str) -> None:
    """In the rank that it stands in; the others stay what they are."""
    slots = AdapterSlots(SHAPE, 1, 2, torch.float32, CPU)
    part = slots.projection(0, "q_proj")
    part.a[:], part.b[:] = 1.0, 1.0
    getattr(part, where)[0, 1, 3] = wrong
    _, b = Int8Slots.of(SHAPE, slots).projection(0, "q_proj").factors(0, 2, torch.float32)
    assert torch.allclose(b[0] * LEVELS, torch.ones(44))
    assert not b[1].isfinite().any()


def test_int8_slots_take_half_the_memory_and_what_is_said() -> None:
    whole, small = (f(SHAPE, 3, 16, torch.bfloat16, CPU) for f in (AdapterSlots, Int8Slots))
    assert small.nbytes == 3 * footprint.slot_bytes(SHAPE, 16, 2, "int8") < 0.6 * whole.nbytes
    assert whole.nbytes == 3 * footprint.slot_bytes(SHAPE, 16, 2)
    assert (whole.stored, small.stored, small.dtype) == (
        torch.bfloat16,
        torch.int8,
        torch.bfloat16,
    )
