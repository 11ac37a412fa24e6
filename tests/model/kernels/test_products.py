"""Which way of 4-bit products is taken: by measurement, with the clock in the test's hand."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mora_serve.model.group_quant import GroupWeight
from mora_serve.model.kernels.four_bit import FourBit
from mora_serve.model.kernels.products import (
    Form,
    Products,
    dense,
    fastest,
    form,
    known_ways,
    measure,
)
from mora_serve.model.quant import DenseWeight, Linear, NF4Weight, fuse, quantise


def matrix(rows: int, columns: int, device: torch.device, seed: int = 0) -> NF4Weight:
    generator = torch.Generator().manual_seed(seed)
    return quantise(torch.randn(rows, columns, generator=generator).to(device))


def test_the_fastest_counts_and_what_cannot_is_left_out() -> None:
    assert fastest({"a": 2.0, "b": 1.0, "c": None}) == "b"
    assert fastest({"a": 2.0, "b": None}) == "a"
    with pytest.raises(RuntimeError, match="no way"):
        fastest({"a": None})


def test_each_shape_and_number_of_rows_gets_its_own_way(device: torch.device) -> None:
    """One way costs a row each, the other is a price once: they cross between 4 and 16 rows."""
    called: list[tuple[str, tuple[int, int], int]] = []

    def way(name: str) -> Callable[[FourBit, Tensor], Tensor]:
        def run(weight: FourBit, x: Tensor) -> Tensor:
            if name == "broken" and weight.shape[0] == 64:
                raise ValueError("not for me")
            called.append((name, weight.shape, len(x)))
            return dense(weight, x)

        return run

    ways = {"few": way("few"), "many": way("many"), "broken": way("broken")}
    cost = {"few": lambda n: n, "many": lambda n: 10.0, "broken": lambda n: 0.5}

    def seconds(work: Callable[[], object]) -> float:
        called.clear()
        work()
        return sum(cost[name](n) for name, _, n in called) / len(called)

    small, large = matrix(64, 64, device), matrix(96, 128, device)
    linears = [Linear((small,)), Linear((DenseWeight(torch.zeros(3, 3)),)), Linear((large,))]
    table = measure(linears, torch.float32, ways, seconds, rows=(1, 4, 16))
    assert table == {
        Form("nf4", 64, 64): {1: "few", 4: "few", 16: "many"},
        Form("nf4", 96, 128): {1: "broken", 4: "broken", 16: "broken"},
    }
    products = Products(ways, "many", table)
    for rows, name in ((1, "few"), (3, "few"), (5, "many"), (400, "many")):
        called.clear()
        products(linears[0], torch.ones(rows, 64, device=device))
        assert called == [(name, (64, 64), rows)]
    called.clear()
    products.part(matrix(32, 64, device), torch.ones(2, 64, device=device))  # of no known shape
    assert called == [("many", (32, 64), 2)]


def in_groups(rows: int, columns: int, device: torch.device, group: int = 32) -> GroupWeight:
    """With zeros, and inputs in an order of their own."""
    g = torch.Generator().manual_seed(rows)
    size = rows, -(-columns // group)
    return GroupWeight(
        torch.randint(256, (rows, columns // 2), generator=g, dtype=torch.uint8).to(device),
        torch.rand(size, generator=g).to(device),
        torch.randint(16, size, generator=g, dtype=torch.uint8).to(device),
        group,
        torch.randperm(columns, generator=g).to(device),
    )


@pytest.mark.parametrize("kind", ["nf4", "groups"])
@pytest.mark.parametrize("rows", [1, 5])
def test_the_ways_compute_the_same(device: torch.device, rows: int, kind: str) -> None:
    weight: FourBit = matrix(96, 128, device) if kind == "nf4" else in_groups(96, 128, device)
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).to(device)
    want = x.double() @ weight.dequantise(torch.float32).double().T
    ways, able = known_ways(device, x.dtype), []
    for name, way in ways.items():
        if name == "bitsandbytes" and device.type != "cuda":
            continue
        try:
            got = way(weight, x)
        except ValueError:
            continue
        assert ((got - want).norm() / want.norm()) < 1e-5, name
        able.append(name)
    own = ("kernel, table", "kernel, tree") if kind == "nf4" else ("kernel, cast", "kernel, bits")
    assert [name for name in able if name != "bitsandbytes"] == [*own, "kernel, dense", "dense"]
    if kind == "groups":
        with pytest.raises(ValueError, match="not NF4"):
            ways["bitsandbytes"](weight, x)


def test_groups_of_other_sizes_are_measured_apart(device: torch.device) -> None:
    """Where no tile fits our kernel is left out, and the rest decides."""
    linears = [Linear((in_groups(8, 64, device),)), Linear((in_groups(8, 64, device, 8),))]
    ways = {name: known_ways(device, torch.float32)[name] for name in ("kernel, cast", "dense")}
    clock = iter((1.0, 2.0, 3.0))

    def seconds(work: Callable[[], object]) -> float:
        return next(clock)

    assert measure(linears, torch.float32, ways, seconds, rows=(1,)) == {
        Form("groups of 32", 8, 64): {1: "kernel, cast"},
        Form("groups of 8", 8, 64): {1: "dense"},
    }
    assert form(matrix(64, 128, device)) == ("nf4", 64, 128)


def test_without_bitsandbytes_every_number_of_rows_has_a_way(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = matrix(64, 64, device), torch.randn(300, 64).to(device)
    want = dense(weight, x)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises ImportError
    ways = known_ways(device, x.dtype)
    assert "bitsandbytes" not in ways
    table = measure([Linear((weight,))], x.dtype, ways, lambda work: 1.0, rows=(300,))
    assert table == {Form("nf4", 64, 64): {300: "kernel, dense"}}
    torch.testing.assert_close(ways["kernel, dense"](weight, x), want)


@pytest.mark.parametrize("error", [OutOfResources(300, 200, "shared memory"), RuntimeError("no")])
def test_a_way_that_does_not_compile_for_a_card_is_left_out(error: Exception) -> None:
    def broken(weight: FourBit, x: Tensor) -> Tensor:
        raise error

    linears = [Linear((matrix(64, 64, torch.device("cpu")),))]
    ways = {"broken": broken, "dense": dense}

    def seconds(work: Callable[[], object]) -> float:
        return 1.0

    table = measure(linears, torch.float32, ways, seconds, rows=(1,))
    assert table == {Form("nf4", 64, 64): {1: "dense"}}


def test_our_kernel_leaves_many_rows_to_others(device: torch.device) -> None:
    way = known_ways(device, torch.float32)["kernel, tree"]
    with pytest.raises(ValueError, match="257 rows"):
        way(matrix(32, 64, device), torch.ones(257, 64, device=device))


def test_parts_of_different_kinds_stand_side_by_side(device: torch.device) -> None:
    one, two = matrix(64, 64, device), DenseWeight(torch.randn(7, 64).to(device))
    linear = fuse([one, two])
    x = torch.randn(3, 64).to(device)
    got = Products({"dense": dense}, "dense")(linear, x)
    assert torch.allclose(got, linear.matmul(x), atol=1e-5)
