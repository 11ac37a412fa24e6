"""Products of every target against float64, and to the bit whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mora_serve.model.footprint import BLOCK
from mora_serve.model.group_quant import GroupWeight
from mora_serve.model.memory import Arena
from mora_serve.model.native.library import Native, targets
from mora_serve.model.native.weight import (
    NativeLinear,
    TiledDenseWeight,
    can_tile,
    can_tile_layer,
    tiled,
)
from mora_serve.model.quant import DenseWeight, Linear, NF4Weight, Weight, quantise

Team = Callable[[int], Native]
SEEDS = st.integers(0, 2**16)
ROWS = st.integers(1, 70)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes(rows: int, columns: int, seed: int, block: int = BLOCK) -> NF4Weight:
    """Any codes and scales, without the quantiser."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    absmax = torch.rand((rows, columns // block), generator=generator) + 0.1
    return NF4Weight(packed, absmax)


def groups(
    rows: int,
    columns: int,
    seed: int,
    group: int = 64,
    *,
    zeros: bool = True,
    ordered: bool = False,
) -> GroupWeight:
    """Any codes, scales and zeros; ``ordered``: inputs in any order."""
    generator = torch.Generator().manual_seed(seed)
    size = (rows, -(-columns // group))
    zero = torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)
    return GroupWeight(
        torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8),
        (torch.rand(size, generator=generator) + 0.1).half().float(),
        zero if zeros else None,
        group,
        torch.randperm(columns, generator=generator) if ordered else None,
    )


def native_of(parts: list[Weight], native: Native) -> NativeLinear:
    arena = Arena()
    return NativeLinear(Linear(tuple(tiled(p, native, arena) for p in parts)))


def multiply(native: Native, linear: NativeLinear, x: Tensor, outs: int) -> Tensor:
    y = torch.full((x.shape[0], outs), float("nan"))
    native.product(linear.struct, x, y)
    return y


def assert_near(got: Tensor, x: Tensor, parts: list[Weight], rounding: float) -> None:
    """Within ``rounding``, relative to the sum of the terms' sizes, of the product in float64."""
    x, weight = x.double(), torch.cat([p.dequantise(torch.float32) for p in parts]).double()
    assert bool(((got - x @ weight.T).abs() <= rounding * (x.abs() @ weight.abs().T)).all())


@given(
    rows=ROWS,
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    blocks=st.integers(1, 5),
    threads=st.integers(1, 3),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=40)
def test_four_bit_products(
    team: Team, rows: int, widths: list[int], blocks: int, threads: int, seed: int
) -> None:
    """Parts of 16 outputs and more, side by side."""
    native, columns = team(threads), 64 * blocks
    parts: list[Weight] = [codes(16 * n, columns, seed + i) for i, n in enumerate(widths)]
    x = random((rows, columns), seed, native.dtype)
    got = multiply(native, native_of(parts, native), x, 16 * sum(widths))
    # where pairs of bfloat16 are multiplied, NF4's 16 values are rounded to it: 8 bits
    rounding = 2.0**-8 if native.dtype is torch.bfloat16 else columns * 2.0**-24
    assert_near(got, x, parts, rounding)


@given(
    rows=ROWS,
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    groups_of=st.sampled_from([(32, 32), (32, 160), (64, 64), (64, 192), (96, 192), (128, 320)]),
    zeros=st.booleans(),
    threads=st.integers(1, 3),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=60)
def test_products_of_whole_numbers_in_groups(
    team: Team,
    rows: int,
    widths: list[int],
    groups_of: tuple[int, int],
    zeros: bool,
    threads: int,
    seed: int,
) -> None:
    """Groups of half a block, of one, of several, the last one short; with a zero each or without.

    No weight is rounded, so bfloat16 is as near as float32.
    """
    native, (group, columns) = team(threads), groups_of
    parts: list[Weight] = [
        groups(16 * n, columns, seed + i, group, zeros=zeros) for i, n in enumerate(widths)
    ]
    x = random((rows, columns), seed, native.dtype)
    got = multiply(native, native_of(parts, native), x, 16 * sum(widths))
    # a sum with another zero is two sums, of codes and of inputs, up to 8 times as large each
    largest = [GroupWeight(torch.zeros_like(p.codes), p.scales, None, p.group) for p in parts]  # type: ignore[attr-defined]
    x64, size = x.double(), torch.cat([p.dequantise(torch.float32) for p in largest]).double()
    want = x64 @ torch.cat([p.dequantise(torch.float32) for p in parts]).double().T
    bound = 4 * columns * 2.0**-24 * (x64.abs() @ size.abs().T)
    assert bool(((got - want).abs() <= bound).all())


@given(
    rows=ROWS,
    outs=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    columns=st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 192])),
    halves=st.booleans(),
    threads=st.integers(1, 3),
    seed=SEEDS,
)
@settings(deadline=None, max_examples=80)
def test_dense_products(
    team: Team, rows: int, outs: list[int], columns: int, halves: bool, threads: int, seed: int
) -> None:
    """Of any size, whole registers or not, in tiles or not; every output is written."""
    native = team(threads)
    weights = [random((n, columns), seed + 1 + i, native.dtype) for i, n in enumerate(outs)]
    if halves:
        weights = [w.bfloat16().to(native.dtype) for w in weights]
    parts: list[Weight] = [DenseWeight(w) for w in weights]
    x = random((rows, columns), seed, native.dtype)
    got = multiply(native, native_of(parts, native), x, sum(outs))
    assert_near(got, x, parts, (columns + 1) * 2.0**-24)


@given(
    rows=ROWS, kind=st.sampled_from(["4 bits", "groups", "half", "tiled", "dense"]), data=st.data()
)
@settings(deadline=None, max_examples=60)
def test_a_row_does_not_see_the_others(
    team: Team, rows: int, kind: str, data: st.DataObject
) -> None:
    """Any subset of the rows in any order, on any number of threads: the same bits."""
    # with rests: no whole number of outputs that go together, nor of registers
    outs, columns = {"tiled": (99, 192), "dense": (99, 203)}.get(kind, (96, 192))
    dense = DenseWeight(random((outs, columns), 3).bfloat16().to(team(1).dtype))
    weight = {
        "4 bits": codes(96, 192, 3),
        "groups": groups(96, 192, 3),
        "half": groups(96, 192, 3, 32),
    }.get(kind, dense)
    assert isinstance(tiled(weight, team(1), Arena()), DenseWeight) == (kind == "dense")
    x = random((rows, columns), rows, team(1).dtype)
    whole = multiply(team(1), native_of([weight], team(1)), x, outs)
    chosen = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
    native = team(data.draw(st.integers(1, 3)))
    linear = native_of([weight], native)
    assert torch.equal(multiply(native, linear, x[chosen].contiguous(), outs), whole[chosen])


@pytest.mark.parametrize("block", [64, 128, 192])
def test_tiles_hold_the_same_numbers(team: Team, block: int) -> None:
    """Also with blocks that are several times as long, and any range of rows."""
    weight = codes(48, 384, 1, block)
    assert can_tile(weight)
    tiles = tiled(weight, team(1), Arena())
    assert tiles.shape == weight.shape
    want = weight.dequantise(torch.float32)
    assert torch.equal(tiles.dequantise(torch.float32), want)
    assert torch.equal(tiles.dequantise(torch.float32, 5, 21), want[5:21])
    assert torch.equal(tiles.dequantise(torch.bfloat16, 40), want[40:].bfloat16())


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_tiles_hold_the_same_groups(team: Team, group: int, zeros: bool) -> None:
    """In the order of x, whatever theirs is; a product takes x as it comes."""
    weight = groups(48, 320, 1, group, zeros=zeros, ordered=True)
    assert can_tile(weight)
    tiles = tiled(weight, team(1), Arena())
    assert tiles.shape == weight.shape
    want = weight.dequantise(torch.float32)
    assert torch.equal(tiles.dequantise(torch.float32), want)
    assert torch.equal(tiles.dequantise(torch.float32, 5, 21), want[5:21])
    x = random((3, 320), 2).bfloat16().to(team(1).dtype)
    torch.testing.assert_close(tiles.matmul(x).float(), x.float() @ want.T, rtol=1e-2, atol=0.1)


def test_layers_that_take_their_inputs_in_several_orders_do_not_tile() -> None:
    """A step brings x into one order for all parts of a layer."""
    one, other = groups(32, 128, 1, ordered=True), groups(32, 128, 2, ordered=True)
    plain = groups(32, 128, 3)
    assert can_tile_layer(Linear((one,)))
    assert can_tile_layer(Linear((plain, DenseWeight(torch.zeros(5, 128)))))
    assert not can_tile_layer(Linear((one, other)))
    assert not can_tile_layer(Linear((one, plain)))


@pytest.mark.parametrize("rows", [1, 16, 4099])
def test_tiles_of_numbers_in_16_bits(team: Team, rows: int) -> None:
    """The same numbers in half the bytes of float32, by ranges and by rows."""
    weight = DenseWeight(random((rows, 320), 1).bfloat16().to(team(1).dtype))
    tiles = tiled(weight, team(1), Arena())
    assert isinstance(tiles, TiledDenseWeight)
    assert tiles.shape == weight.shape
    assert tiles.nbytes == -(-rows // 16) * 16 * 320 * 2
    for first, last in ((0, None), (rows // 3, rows - rows // 5), (rows - 1, rows)):
        assert torch.equal(
            tiles.dequantise(torch.float32, first, last),
            weight.dequantise(torch.float32, first, last),
        )
    indices = torch.tensor([rows - 1, 0, rows // 2, 0])
    assert torch.equal(tiles.rows(indices, torch.bfloat16), weight.rows(indices, torch.bfloat16))


@pytest.mark.parametrize("change", [2.0**-20, float("nan")])
def test_what_bfloat16_does_not_hold_stays_as_it_is(change: float) -> None:
    """One number is enough."""
    if not targets(torch.float32):
        pytest.skip("no compiler built the library")
    native = Native(torch.float32, 1)
    weight = random((5000, 256), 1).bfloat16().float()
    assert isinstance(tiled(DenseWeight(weight), native, Arena()), TiledDenseWeight)
    weight[4321, 99] += change
    same = tiled(DenseWeight(weight), native, Arena())
    assert isinstance(same, DenseWeight)
    assert torch.equal(same.weight.nan_to_num(7), weight.nan_to_num(7))


def test_what_bitsandbytes_quantises(team: Team) -> None:
    """The real codes: within rounding of what bitsandbytes dequantises."""
    import bitsandbytes.functional as bnb

    weight = random((64, 256), 5)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    want = bnb.dequantize_4bit(packed, state)
    got = tiled(quantise(weight), team(1), Arena()).dequantise(torch.float32)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("rows", "columns", "block"), [(24, 128, 64), (32, 96, 32), (32, 160, 32)])
def test_shapes_that_do_not_tile(rows: int, columns: int, block: int) -> None:
    """Outputs beside tiles of 16, blocks of less than 64."""
    assert not can_tile(codes(rows, columns, 0, block))
    assert not can_tile(groups(rows, columns - columns % 64 + 16, 0, 16))


def test_gradients_flow_through_tiles(team: Team) -> None:
    """A trainer may multiply with the served weight."""
    tiles = tiled(codes(32, 64, 2), team(1), Arena())
    x = random((3, 64), 1).requires_grad_()
    tiles.matmul(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, tiles.dequantise(torch.float32).sum(0).expand(3, -1), atol=1e-5)
