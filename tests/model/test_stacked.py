"""The trainable mixed layer against the served one, and its gradients against autograd's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mora_serve.model.lora import AdapterSlots, PooledAdapters, plan_mixtures
from mora_serve.model.shape import PROJECTIONS, SITES, ModelShape
from mora_serve.model.stacked import StackedAdapters

SHAPE = ModelShape("llama", 32, 16, 24, 1, 4, 2, 4, 64, 1e-6)


def filled(
    count: int, targets: tuple[str, ...] = PROJECTIONS, scaled: bool = False
) -> StackedAdapters:
    stacked = StackedAdapters(SHAPE, count, 2, 4, targets, layer_scales=scaled).double()
    if stacked.scales is not None:
        torch.nn.init.normal_(stacked.scales)
    for b in stacked.b.parameters():
        torch.nn.init.normal_(b)
    return stacked


def formula(stacked: StackedAdapters, site: str, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The definition, one adapter and projection after the other, for autograd to follow."""
    if stacked.scales is not None:
        weights = weights * stacked.scales[:, 0]
    tokens = weights.repeat_interleave(len(x) // len(weights), 0)
    widths = [SHAPE.projection(p)[0] for p in SITES[site]]
    parts = []
    for name, part in zip(SITES[site], y.split(widths, 1), strict=True):
        if name in stacked.targets:
            for i in range(stacked.count):
                a, b = stacked.projection(0, name, i)
                part = part + tokens[:, i, None] * 2.0 * (x @ a.T @ b)
        parts.append(part)
    return torch.cat(parts, 1)


def check(stacked: StackedAdapters, site: str, weights: Tensor, rows: int, length: int) -> None:
    """Values and all gradients of ``apply`` are the formula's."""
    columns = SHAPE.projection(SITES[site][0])[1]
    width = sum(SHAPE.projection(p)[0] for p in SITES[site])
    x, y = (torch.randn(rows * length, n, dtype=torch.float64) for n in (columns, width))
    inputs = [x, y, weights] if weights.requires_grad else [x, y]
    wanted = [*(t.requires_grad_() for t in inputs), *stacked.parameters()]
    ours = stacked.mix(weights, length).apply(0, site, x, y.clone())
    theirs = formula(stacked, site, weights, x, y)
    torch.testing.assert_close(ours, theirs)
    got, want = (
        torch.autograd.grad(out.sin().sum(), wanted, allow_unused=True) for out in (ours, theirs)
    )
    for mine, other in zip(got, want, strict=True):
        none = [t is None or not t.any() for t in (mine, other)]
        assert none[0] == none[1]
        if mine is not None and other is not None:
            torch.testing.assert_close(mine, other)


def test_the_trainable_form_equals_the_served_form():
    """StackedAdapters and the slots give the same sums, and gradients reach only used adapters."""
    torch.manual_seed(0)
    stacked = filled(3).float()
    slots = AdapterSlots(SHAPE, 3, 2, torch.float32, torch.device("cpu"))
    for i in range(3):
        slots.ranks[i] = 2
        for name, t in stacked.export(i).items():
            part = slots.projection(0, name.split(".")[-3])
            if "lora_A" in name:
                part.a[i] = t
            else:
                part.b[i] = t.T * 2
    x, y = torch.randn(4, 16), torch.randn(4, 48)
    weights = torch.tensor([[1.0, 0, 0.5], [0, 0, 0]])
    plan = plan_mixtures(slots, [((0, 1.0), (2, 0.5)), ()], [2, 2])
    assert plan is not None
    got = stacked.mix(weights, length=2).apply(0, "gate_up", x, y.clone())
    torch.testing.assert_close(got, PooledAdapters(slots, plan).apply(0, "gate_up", x, y.clone()))
    got.square().sum().backward()
    gradients = [stacked.a[f"0/gate_up/{i}"].grad for i in range(3)]
    assert gradients[1] is None
    assert all(g is not None and g.abs().max() > 0 for g in (gradients[0], gradients[2]))


@pytest.mark.parametrize("learned", [True, False], ids=["weights learned", "given"])
@pytest.mark.parametrize(
    "targets", [PROJECTIONS, ("gate_proj",), ("up_proj", "down_proj"), ("q_proj", "v_proj")]
)
def test_gradients_are_those_of_the_formula(targets, learned):
    """Of inputs, base outputs, weights, A and B, whichever projections are targets."""
    torch.manual_seed(0)
    weights = torch.tensor([[1.0, 0, -0.5], [0.3, 0, 0]], dtype=torch.float64)
    for site in SITES:
        given_weights = weights.clone().requires_grad_(learned)
        check(filled(3, targets), site, given_weights, rows=2, length=2)


mixture = st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, -0.5]), min_size=5, max_size=5)


@settings(max_examples=40, deadline=None)
@given(
    mixtures=st.lists(mixture, min_size=1, max_size=6),
    length=st.sampled_from([1, 3, 50, 90]),
    seed=st.integers(0, 100),
    scaled=st.booleans(),
)
def test_blocks_leave_nothing_out(mixtures, length, seed, scaled):
    """Whatever the rows' mixtures, their order and length, sums and gradients are the formula's.

    So they are with layer scales.
    """
    torch.manual_seed(seed)
    weights = torch.tensor(mixtures, dtype=torch.float64)
    check(filled(5, scaled=scaled), "qkv", weights, len(mixtures), length)


def test_a_row_without_adapters_is_not_touched():
    """Its tokens keep the base's bits, between rows that have adapters."""
    torch.manual_seed(0)
    weights = torch.tensor([[1.0, 0], [0, 0], [0, 1.0]])
    x, y = torch.randn(6, 16), torch.randn(6, 48)
    out = filled(2).float().mix(weights, length=2).apply(0, "gate_up", x, y.clone())
    changed = (out != y).any(1)
    assert changed.tolist() == [True, True, False, False, True, True]


def test_projections_are_views_under_their_own_names():
    """What is written into a projection's A and B is what is exported; others are KeyErrors."""
    stacked = filled(2, ("k_proj", "down_proj"))
    with torch.no_grad():
        a, b = stacked.projection(0, "k_proj", 1)
        a.fill_(3.0)
        b.fill_(4.0)
    exported = stacked.export(1)
    k = "base_model.model.model.layers.0.self_attn.k_proj"
    assert exported[f"{k}.lora_A.weight"].unique().tolist() == [3.0]
    assert exported[f"{k}.lora_B.weight"].unique().tolist() == [4.0]
    assert len(exported) == 4
    with pytest.raises(KeyError):
        stacked.projection(0, "q_proj", 0)
