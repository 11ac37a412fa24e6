"""Slots and pages from numbers: no device is asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.config import DEFAULT_SLOTS, AdaptersConfig, Config, EngineConfig
from mora_serve.engine.sizes import (
    CPU_KV_BYTES,
    GRAPH_BYTES,
    SLOT_SHARE,
    choose_sizes,
    page_bytes,
    slot_bytes,
    workspace_bytes,
)
from mora_serve.errors import ConfigError
from mora_serve.model.shape import ModelShape

GB = 10**9
# Llama-3.1-8B
SHAPE = ModelShape("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072, 1e-5)


def config(engine: dict[str, Any] | None = None, **adapters: Any) -> Config:
    return Config(engine=EngineConfig(**(engine or {})), adapters=AdaptersConfig(**adapters))


def test_what_one_slot_and_one_page_take() -> None:
    """By hand: rank 16 on q, k, v, o, gate, up, down; keys and values of 8 heads of 128."""
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    outs = 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096
    assert slot_bytes(SHAPE, 16, 2) == (16 * sides + outs) * 32 * 2
    assert page_bytes(SHAPE, 16, 2) == 2 * 32 * 8 * 128 * 16 * 2


def test_int8_slots_are_half_as_large_and_twice_as_many() -> None:
    """By hand: a byte a number, 4 a rank and projection; a quarter of a card goes twice as far."""
    sides = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    outs = 2 * 4096 + 2 * 1024 + 2 * 14336 + 4096
    assert slot_bytes(SHAPE, 16, 2, "int8") == (16 * sides + 7 * 16 * 4 + outs * 2) * 32
    whole, rounded = (
        choose_sizes(SHAPE, config({"max_batch": 256}, dtype=dtype), 8192, 2, 40 * GB)
        for dtype in ("auto", "int8")
    )
    assert 1.9 < rounded.slots / whole.slots < 2.1


def test_on_a_cpu_sizes_are_plain_defaults() -> None:
    sizes = choose_sizes(SHAPE, config(), 131072, 2)
    assert sizes.slots == DEFAULT_SLOTS
    assert sizes.pages == CPU_KV_BYTES // page_bytes(SHAPE, 16, 2) + 1
    small = choose_sizes(replace(SHAPE, max_positions=64), config({"max_batch": 2}), 64, 2)
    assert small.pages == 2 * 4 + 1


@given(
    free=st.integers(1 * GB, 200 * GB),
    fraction=st.floats(0.1, 1.0),
    rank=st.sampled_from([8, 16, 64]),
    slots=st.sampled_from([0, 4, 32]),
    pages=st.sampled_from([{}, {"kv_pages": 500}, {"kv_bytes": 2 * GB}]),
    batch=st.integers(1, 128),
)
def test_what_is_chosen_fits_and_leaves_little(
    free: int, fraction: float, rank: int, slots: int, pages: dict[str, int], batch: int
) -> None:
    engine = {"memory_fraction": fraction, "max_batch": batch, **pages}
    wanted = config(engine, slots=slots, max_rank=rank)
    slot, page = slot_bytes(SHAPE, rank, 2), page_bytes(SHAPE, 16, 2)
    asked = pages.get("kv_pages") or min(pages.get("kv_bytes", 0) // page, batch * 512) or batch
    room = int(free * fraction) - workspace_bytes(SHAPE, 512, batch, 2) - GRAPH_BYTES
    if (asked + 1) * page + (slots or 4) * slot > room:
        with pytest.raises(ConfigError, match=r"lower adapters\.slots"):
            choose_sizes(SHAPE, wanted, 8192, 2, free)
        return
    sizes = choose_sizes(SHAPE, wanted, 8192, 2, free)
    taken = sizes.slots * slot + sizes.pages * page
    assert taken + workspace_bytes(SHAPE, 512, batch, 2) <= free * fraction
    assert sizes.slots == slots or 4 <= sizes.slots <= max(4, batch)
    if pages.get("kv_pages"):
        assert sizes.pages == 501
    elif pages:
        assert sizes.pages == 1 + min(2 * GB // page, batch * 512)
    else:
        assert sizes.pages > batch
        if sizes.pages < batch * 512 + 1:  # not as much as could ever be used: all there is
            left = free * fraction - taken - workspace_bytes(SHAPE, 512, batch, 2)
            assert left < GRAPH_BYTES + 2 * page
    if not slots and sizes.slots > 4:
        assert sizes.slots * slot <= SLOT_SHARE * free


def test_a_card_that_is_too_small_is_an_error_that_names_numbers_and_remedies() -> None:
    with pytest.raises(ConfigError, match=r"32 slots of rank 64 take 10\.8 GB") as e:
        choose_sizes(SHAPE, config(slots=32), 8192, 2, 8 * GB)
    assert e.value.field == "adapters.slots"
    assert "8.0 GB free" in e.value.message
    with pytest.raises(ConfigError, match=r"the device has 0\.0 GB for both"):
        choose_sizes(SHAPE, config(), 8192, 2, GB // 2)
