"""Products straight from 4-bit codes, against the dequantised weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from mora_serve.model.group_quant import GroupWeight, in_order
from mora_serve.model.kernels.four_bit import (
    GROUP_LOOKUPS,
    NF4_LOOKUPS,
    FourBit,
    FourBitProduct,
    Plan,
    default_plan,
)
from mora_serve.model.quant import VALUES, NF4Weight, quantise
from tests.model.kernels.compare import DTYPES, TOLERANCE, same_bits

PLANS = {
    "row": Plan(0, 16, 128, 1, "table"),
    "row-tree-split": Plan(0, 8, 256, 3, "tree"),
    "tile": Plan(16, 32, 64, 1, "table"),
    "tile-tree-split": Plan(32, 64, 128, 2, "tree"),
    "row-cast": Plan(0, 16, 128, 1, "cast"),
    "row-bits-split": Plan(0, 8, 256, 3, "bits"),
    "tile-cast-split": Plan(32, 64, 128, 2, "cast"),
    "tile-bits": Plan(16, 32, 64, 1, "bits"),
}
# (rows of x, out, in), odd where they may be, and what is to compute them
PRODUCTS = [
    ((1, 33, 128), "row"),
    ((3, 20, 640), "row-tree-split"),
    ((1, 40, 192), "tile"),
    ((17, 33, 128), "tile"),
    ((35, 70, 320), "tile-tree-split"),
]


def weight(out: int, columns: int, device: torch.device) -> NF4Weight:
    g = torch.Generator().manual_seed(out + columns)
    made = quantise(torch.randn(out, columns, generator=g))
    return NF4Weight(made.codes.to(device), made.absmax.to(device))


def groups(
    out: int,
    columns: int,
    device: torch.device,
    group: int = 64,
    *,
    zeros: bool = True,
    ordered: bool = True,
) -> GroupWeight:
    """Any codes; scales of 16 bits, as checkpoints have them."""
    g = torch.Generator().manual_seed(out + columns)
    size = (out, -(-columns // group))
    zero = torch.randint(16, size, generator=g, dtype=torch.uint8).to(device)
    return GroupWeight(
        torch.randint(256, (out, columns // 2), generator=g, dtype=torch.uint8).to(device),
        torch.rand(size, generator=g).half().float().to(device),
        zero if zeros else None,
        group,
        torch.randperm(columns, generator=g).to(device) if ordered else None,
    )


def of_kind(plan: str, out: int, columns: int, device: torch.device) -> FourBit:
    """A weight that this plan is for."""
    make: Any = weight if PLANS[plan].lookup in NF4_LOOKUPS else groups
    found: FourBit = make(out, columns, device)
    return found


def activations(rows: int, columns: int, dtype: torch.dtype, device: torch.device):
    g = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=g).to(device, dtype)


def assert_product(y, x, w: FourBit, dtype: torch.dtype) -> None:
    """Rounded weights may each be off by one rounding, and so may the result."""
    dense = w.dequantise(torch.float32).double()
    expected = x.double() @ dense.T
    spread = (x.double() ** 2 @ (dense**2).T).sqrt()
    error = (y.double() - expected).abs()
    assert y.dtype == dtype
    assert bool((error <= TOLERANCE[dtype] * (2 * spread + expected.abs())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "plan"), PRODUCTS, ids=str)
def test_the_product_is_that_of_the_dequantised_weight(size, plan, dtype, device):
    rows, out, columns = size
    w, x = weight(out, columns, device), activations(rows, columns, dtype, device)
    assert_product(FourBitProduct(device, dtype)(x, w, PLANS[plan]), x, w, dtype)


@given(data=st.data())
@settings(deadline=None, max_examples=15, derandomize=True)
def test_whole_numbers_in_groups_are_multiplied_as_they_are(data, device):
    """Groups of checkpoints, the last one perhaps short, or one group; odd numbers of outputs.

    With zeros and without, inputs in any order; twice, to the same bits. What x is rounded to
    apart, only sums in float32 and the result are rounded.
    """
    group = data.draw(st.sampled_from([32, 64, 128, 0]), "group, 0 for a whole row")
    columns = 32 * data.draw(st.integers(1, 7), "columns / 32")
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    zeros, ordered = data.draw(st.booleans(), "zeros"), data.draw(st.booleans(), "order")
    plan = data.draw(st.sampled_from([p for p in PLANS.values() if p.lookup in GROUP_LOOKUPS]))
    rows = data.draw(st.integers(1, 20 if plan.tile_rows else 2), "rows")  # a program each there
    out = data.draw(st.integers(1, 40), "out")
    w = groups(out, columns, device, group or columns, zeros=zeros, ordered=ordered)
    x = activations(rows, columns, dtype, device)
    product = FourBitProduct(device, dtype)
    y = product(x, w, plan)
    assert same_bits(product(x, w, plan), y)
    dense = w.dequantise(torch.float32).double()
    expected, reach = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    limit = TOLERANCE[dtype] * expected.abs() + 1e-6 * reach
    assert y.dtype == dtype
    assert bool(((y.double() - expected).abs() <= limit).all())


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("lookup", [*NF4_LOOKUPS, *GROUP_LOOKUPS])
def test_the_matrix_is_written_as_torch_writes_it(lookup, ordered, device):
    """To the bit, in 16 and 32 of them."""
    w: FourBit = weight(33, 128, device)
    if lookup in GROUP_LOOKUPS:
        w = groups(33, 128, device, 40, zeros=ordered, ordered=ordered)
    order = getattr(w, "order", None)
    for dtype in (torch.float32, torch.bfloat16):
        product = FourBitProduct(device, dtype)
        got = product.dense(w, dtype, lookup)
        want = w.dequantise(dtype)
        assert same_bits(got, want if order is None else want[:, order])
        x = activations(5, 128, dtype, device)
        assert same_bits(product.by_dense(x, w), linear(in_order(x, order), got))


def test_the_values_are_those_of_bitsandbytes(device):
    """All sixteen codes in both halves of a byte, with either lookup, in either form."""
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32).to(device)
    w = NF4Weight(codes, torch.ones(8, 1, device=device))
    dense = w.dequantise(torch.float32)
    assert same_bits(dense.flatten()[1:32:2].cpu(), torch.tensor(VALUES))
    product = FourBitProduct(device, torch.float32)
    identity = torch.eye(64, device=device)
    assert same_bits(product(identity, w, PLANS["tile"]).T, dense)
    assert same_bits(product(identity, w, PLANS["tile-tree-split"]).T, dense)
    for start in range(0, 64, 16):
        part = identity[start : start + 16].contiguous()
        assert same_bits(product(part, w, PLANS["row"]).T, dense[:, start : start + 16])


@pytest.mark.parametrize(
    ("dtype", "integers", "ones"),
    [
        (torch.bfloat16, torch.int16, 0x4300),
        (torch.float16, torch.int16, 0x6400),
        (torch.float32, torch.int32, 0x4B000000),
    ],
    ids=str,
)
def test_the_bits_of_whole_numbers_are_exact_on_a_card_too(dtype, integers, ones):
    """The interpreter has no bfloat16: what the kernel does with bits, done by torch."""
    number = (torch.arange(16, dtype=integers) | ones).view(dtype)
    difference = number[:, None] - number[None, :]
    want = torch.arange(16)[:, None] - torch.arange(16)[None, :]
    assert torch.equal(difference, want.to(dtype))


@pytest.mark.parametrize(("block", "plan"), [(128, "row"), (256, "tile")])
def test_larger_blocks_of_a_checkpoint_are_read(block, plan, device):
    w = weight(32, 512, device)
    w = NF4Weight(w.codes, w.absmax[:, :: block // 64].contiguous())
    x = activations(3, 512, torch.float32, device)
    assert_product(FourBitProduct(device, torch.float32)(x, w, PLANS[plan]), x, w, torch.float32)


@pytest.mark.parametrize("plan", PLANS)
def test_two_runs_and_other_neighbours_give_the_same_bits(plan, device):
    w, x = of_kind(plan, 40, 128, device), activations(4, 128, torch.bfloat16, device)
    product = FourBitProduct(device, torch.bfloat16)
    first = product(x, w, PLANS[plan])
    assert same_bits(product(x, w, PLANS[plan]), first)
    x[[0, 1, 3]] = float("nan")
    y = product(x, w, PLANS[plan])
    assert same_bits(y[2], first[2])
    assert y[[0, 1, 3]].isnan().all()


def test_the_result_can_be_put_where_it_belongs(device):
    w, x = weight(32, 64, device), activations(2, 64, torch.float32, device)
    product, plan = FourBitProduct(device, torch.float32), PLANS["row"]
    out = torch.empty(2, 32, device=device)
    assert product(x, w, plan, out) is out
    assert same_bits(out, product(x, w, plan))


@pytest.mark.parametrize(
    ("group", "columns", "lookup", "said"),
    [(40, 320, "cast", "groups of 40 of 320"), (64, 72, "bits", "groups of 64 of 72")],
)
def test_groups_that_no_tile_fits_are_left_to_others(group, columns, lookup, said, device):
    w, x = groups(8, columns, device, group), activations(1, columns, torch.float32, device)
    with pytest.raises(ValueError, match=said):
        FourBitProduct(device, x.dtype)(x, w, Plan(0, 8, 64, 1, lookup))


@pytest.mark.parametrize("kind", ["nf4", "groups"])
def test_a_plan_of_another_kind_of_weight_is_refused(kind, device):
    w = weight(8, 64, device) if kind == "nf4" else groups(8, 64, device)
    other = GROUP_LOOKUPS[0] if kind == "nf4" else NF4_LOOKUPS[0]
    product = FourBitProduct(device, torch.float32)
    with pytest.raises(ValueError, match=f"values by {other}"):
        product(activations(1, 64, torch.float32, device), w, Plan(0, 8, 64, 1, other))
    with pytest.raises(ValueError, match=f"values by {other}"):
        product.dense(w, torch.float32, other)


@pytest.mark.parametrize("lookup", [*NF4_LOOKUPS, *GROUP_LOOKUPS])
@pytest.mark.parametrize(("rows", "out", "columns"), [(1, 20, 2048), (6, 33, 256)])
def test_the_default_plan_gives_the_product(rows, out, columns, lookup, device):
    make: Any = weight if lookup in NF4_LOOKUPS else groups
    w, x = make(out, columns, device), activations(rows, columns, torch.float32, device)
    plan = default_plan(rows, out, columns, lookup)
    assert plan.splits == columns // 1024 or columns < 1024
    y = FourBitProduct(device, torch.float32)(x, w, plan)
    assert_product(y, x, w, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 256])
@pytest.mark.parametrize(("out", "columns"), [(6144, 4096), (28672, 4096), (4096, 14336)])
def test_the_sizes_of_a_large_model(rows, out, columns, device):
    x = activations(rows, columns, torch.bfloat16, device)
    product = FourBitProduct(device, torch.bfloat16)
    of_lookups = dict.fromkeys(NF4_LOOKUPS, weight(out, columns, device))
    of_lookups |= dict.fromkeys(GROUP_LOOKUPS, groups(out, columns, device, 128))
    for lookup, w in of_lookups.items():
        plan = default_plan(rows, out, columns, lookup)
        assert_product(product(x, w, plan), x, w, torch.bfloat16)
