"""The arena: zeroed tensors side by side, freed with their block."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.model import memory
from mora_serve.model.memory import ALIGNMENT, HUGE_PAGE, Arena

SHAPES = st.lists(
    st.tuples(
        st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
        st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]),
    ),
    min_size=1,
    max_size=12,
)


@given(SHAPES)
@settings(deadline=None, max_examples=50)
def test_tensors_do_not_overlap(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Each is zero, aligned to a register and writable without a trace in the others."""
    arena = Arena()
    made = [arena.zeros(*shape) for shape in shapes]
    for (shape, dtype), tensor in zip(shapes, made, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.numel() == 0 or tensor.data_ptr() % ALIGNMENT == 0
    for i, tensor in enumerate(made):
        assert not tensor.any()
        tensor.fill_(i + 1)
    assert all(bool((t == i + 1).all()) for i, t in enumerate(made))


def test_blocks_begin_at_huge_pages_and_grow_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a tensor that is larger than a block."""
    monkeypatch.setattr(memory, "BLOCK_BYTES", 1 << 12)
    arena = Arena()
    small, large, next_ = (arena.zeros((n,), torch.uint8) for n in (100, 10_000, 100))
    assert small.data_ptr() % HUGE_PAGE == large.data_ptr() % HUGE_PAGE == 0
    assert next_.data_ptr() % HUGE_PAGE == 0
    assert not large.any()


def test_a_copy_is_its_own() -> None:
    """In a row, whatever the original's strides."""
    source = torch.arange(12).view(3, 4).T
    copy = Arena().copy(source)
    assert copy.is_contiguous()
    assert torch.equal(copy, source)
    copy.zero_()
    assert int(source[0, 1]) == 4


def test_a_block_lives_as_long_as_its_tensors() -> None:
    """The arena itself may go."""
    arena = Arena()
    tensor = arena.zeros((64,), torch.float32)
    base = weakref.ref(arena)
    del arena
    gc.collect()
    assert base() is None
    tensor += 1
    assert float(tensor.sum()) == 64.0
