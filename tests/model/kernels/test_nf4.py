"""Products straight from NF4 codes, against the dequantised weight."""

from __future__ import annotations

import pytest
import torch

from mora_serve.model.kernels.nf4 import VALUES, NF4Product, Plan, default_plan
from mora_serve.model.quant import NF4Weight, quantise
from tests.model.kernels.compare import DTYPES, TOLERANCE, same_bits

PLANS = {
    "row": Plan(0, 16, 2, 1, "table"),
    "row-tree-split": Plan(0, 8, 4, 3, "tree"),
    "tile": Plan(16, 32, 1, 1, "table"),
    "tile-tree-split": Plan(32, 64, 2, 2, "tree"),
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


def activations(rows: int, columns: int, dtype: torch.dtype, device: torch.device):
    g = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=g).to(device, dtype)


def assert_product(y, x, w: NF4Weight, dtype: torch.dtype) -> None:
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
    assert_product(NF4Product(device, dtype)(x, w, PLANS[plan]), x, w, dtype)


def test_the_values_are_those_of_bitsandbytes(device):
    """All sixteen codes in both halves of a byte, with either lookup, in either kernel."""
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32).to(device)
    w = NF4Weight(codes, torch.ones(8, 1, device=device))
    dense = w.dequantise(torch.float32)
    assert same_bits(dense.flatten()[1:32:2].cpu(), torch.tensor(VALUES))
    product = NF4Product(device, torch.float32)
    identity = torch.eye(64, device=device)
    assert same_bits(product(identity, w, PLANS["tile"]).T, dense)
    assert same_bits(product(identity, w, PLANS["tile-tree-split"]).T, dense)
    for start in range(0, 64, 16):
        part = identity[start : start + 16].contiguous()
        assert same_bits(product(part, w, PLANS["row"]).T, dense[:, start : start + 16])


@pytest.mark.parametrize(("block", "plan"), [(128, "row"), (256, "tile")])
def test_larger_blocks_of_a_checkpoint_are_read(block, plan, device):
    w = weight(32, 512, device)
    w = NF4Weight(w.codes, w.absmax[:, :: block // 64].contiguous())
    x = activations(3, 512, torch.float32, device)
    assert_product(NF4Product(device, torch.float32)(x, w, PLANS[plan]), x, w, torch.float32)


@pytest.mark.parametrize("plan", PLANS)
def test_two_runs_and_other_neighbours_give_the_same_bits(plan, device):
    w, x = weight(40, 128, device), activations(4, 128, torch.bfloat16, device)
    product = NF4Product(device, torch.bfloat16)
    first = product(x, w, PLANS[plan])
    assert same_bits(product(x, w, PLANS[plan]), first)
    x[[0, 1, 3]] = float("nan")
    y = product(x, w, PLANS[plan])
    assert same_bits(y[2], first[2])
    assert y[[0, 1, 3]].isnan().all()


def test_the_result_can_be_put_where_it_belongs(device):
    w, x = weight(32, 64, device), activations(2, 64, torch.float32, device)
    product, plan = NF4Product(device, torch.float32), PLANS["row"]
    out = torch.empty(2, 32, device=device)
    assert product(x, w, plan, out) is out
    assert same_bits(out, product(x, w, plan))


@pytest.mark.parametrize("lookup", ["table", "tree"])
@pytest.mark.parametrize(("rows", "out", "columns"), [(1, 20, 2048), (6, 33, 256)])
def test_the_default_plan_gives_the_product(rows, out, columns, lookup, device):
    w, x = weight(out, columns, device), activations(rows, columns, torch.float32, device)
    plan = default_plan(rows, out, columns, lookup)
    assert plan.splits == columns // 1024 or columns < 1024
    y = NF4Product(device, torch.float32)(x, w, plan)
    assert_product(y, x, w, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 64, 256])
@pytest.mark.parametrize(("out", "columns"), [(6144, 4096), (28672, 4096), (4096, 14336)])
def test_the_sizes_of_a_large_model(rows, out, columns, device):
    w, x = weight(out, columns, device), activations(rows, columns, torch.bfloat16, device)
    product = NF4Product(device, torch.bfloat16)
    for lookup in ("table", "tree"):
        plan = default_plan(rows, out, columns, lookup)
        assert_product(product(x, w, plan), x, w, torch.bfloat16)
