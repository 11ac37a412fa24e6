"""The mixed low-rank layer against the formula, row by row."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.model.lora import (
    AdapterSlots,
    PooledAdapters,
    dora_norm,
    plan_mixtures,
)
from mora_serve.model.shape import SITES, ModelShape

SHAPE = ModelShape("llama", 32, 16, 24, 1, 4, 2, 4, 64, 1e-6)
SLOTS, MAX_RANK = 6, 5


def filled_slots(seed: int, dora: bool) -> AdapterSlots:
    generator = torch.Generator().manual_seed(seed)
    slots = AdapterSlots(SHAPE, SLOTS, MAX_RANK, torch.float32, torch.device("cpu"))
    for slot in range(SLOTS):
        slots.ranks[slot] = rank = 1 + slot % MAX_RANK
        for part in slots.parts():
            part.a[slot, :rank] = torch.randn(part.a[slot, :rank].shape, generator=generator)
            part.b[slot, :rank] = torch.randn(part.b[slot, :rank].shape, generator=generator)
            part.dora[slot] = torch.rand(part.width, generator=generator) - 0.5
        slots.has_dora[slot] = dora and slot % 2 == 1
    return slots


mixture = st.lists(
    st.tuples(st.integers(0, SLOTS - 1), st.floats(-2, 2, width=32)),
    max_size=4,
    unique_by=lambda pair: pair[0],
).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.tuples(mixture, st.integers(1, 4)), min_size=1, max_size=8),
    dora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_row_gets_its_own_mixture(chunks, dora, seed):
    """Whatever shares the batch, a row's result is Wx plus the weighted sum over its adapters."""
    slots = filled_slots(seed, dora)
    mixtures, lengths = [m for m, _ in chunks], [n for _, n in chunks]
    plan = plan_mixtures(slots, mixtures, lengths)
    generator = torch.Generator().manual_seed(seed)
    for site, projections in SITES.items():
        width = sum(SHAPE.projection(p)[0] for p in projections)
        x = torch.randn(sum(lengths), SHAPE.projection(projections[0])[1], generator=generator)
        base = torch.randn(sum(lengths), width, generator=generator)
        got = base.clone()
        if plan is not None:
            got = PooledAdapters(slots, plan).apply(0, site, x, got)
        row = 0
        for m, n in chunks:
            for _ in range(n):
                want = base[row].double()
                for slot, weight in m:
                    for part in slots.layers[0][site]:
                        out = slice(part.start, part.start + part.width)
                        delta = (x[row].double() @ part.a[slot].double().T) @ part.b[slot].double()
                        if slots.has_dora[slot]:
                            c = 1 + part.dora[slot].double()
                            delta = c * delta + (c - 1) * base[row, out].double()
                        want[out] += weight * delta
                torch.testing.assert_close(got[row].double(), want, rtol=1e-4, atol=1e-4)
                if not m:
                    assert torch.equal(got[row], base[row])
                row += 1


def test_an_adapter_of_nan_does_not_reach_other_rows():
    """Isolation is structural: rows that do not use a slot never see its numbers."""
    slots = filled_slots(0, False)
    for part in slots.parts():
        part.a[2] = float("nan")
        part.b[2] = float("nan")
    mixtures = [((0, 1.0),), ((1, 1.0),), ((2, 1.0),), ((3, 1.0),), ()]
    plan = plan_mixtures(slots, mixtures, [1] * 5)
    assert plan is not None
    y = PooledAdapters(slots, plan).apply(0, "qkv", torch.randn(5, 16), torch.zeros(5, 32))
    assert torch.isnan(y[2]).all()
    assert torch.isfinite(y[[0, 1, 3, 4]]).all()


def test_dora_norms_are_of_the_merged_rows():
    w, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(2, 6)
    want = torch.stack([(w[i] + b[:, i] @ a).norm() for i in range(6)])
    torch.testing.assert_close(dora_norm(w, a, b), want)
