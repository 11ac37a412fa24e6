"""Which way of 4-bit products is taken: by measurement, with the clock in the test's hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from mora_serve.model.kernels.products import Products, dense, fastest, known_ways, measure
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

    def way(name: str) -> Callable[[NF4Weight, Tensor], Tensor]:
        def run(weight: NF4Weight, x: Tensor) -> Tensor:
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
        (64, 64): {1: "few", 4: "few", 16: "many"},
        (96, 128): {1: "broken", 4: "broken", 16: "broken"},
    }
    products = Products(ways, "many", table)
    for rows, name in ((1, "few"), (3, "few"), (5, "many"), (400, "many")):
        called.clear()
        products(linears[0], torch.ones(rows, 64, device=device))
        assert called == [(name, (64, 64), rows)]
    called.clear()
    products.part(matrix(32, 64, device), torch.ones(2, 64, device=device))  # of no known shape
    assert called == [("many", (32, 64), 2)]


@pytest.mark.parametrize("rows", [1, 5])
def test_the_ways_compute_the_same(device: torch.device, rows: int) -> None:
    weight = matrix(96, 128, device)
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).to(device)
    want = x.double() @ weight.dequantise(torch.float32).double().T
    ways = known_ways(device, x.dtype)
    assert {"kernel, table", "kernel, tree", "dense"} <= set(ways)
    for name, way in ways.items():
        if name != "bitsandbytes" or device.type == "cuda":
            assert ((way(weight, x) - want).norm() / want.norm()) < 1e-5, name


@pytest.mark.parametrize("error", [OutOfResources(300, 200, "shared memory"), RuntimeError("no")])
def test_a_way_that_does_not_compile_for_a_card_is_left_out(error: Exception) -> None:
    def broken(weight: NF4Weight, x: Tensor) -> Tensor:
        raise error

    linears = [Linear((matrix(64, 64, torch.device("cpu")),))]
    ways = {"broken": broken, "dense": dense}

    def seconds(work: Callable[[], object]) -> float:
        return 1.0

    table = measure(linears, torch.float32, ways, seconds, rows=(1,))
    assert table == {(64, 64): {1: "dense"}}


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
