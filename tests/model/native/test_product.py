"""Products of every target against float64, and to the bit whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mora_serve.model.memory import Arena
from mora_serve.model.native.library import Native, targets
from mora_serve.model.native.weight import NativeLinear, TiledDenseWeight, can_tile, tiled
from mora_serve.model.quant import BLOCK, DenseWeight, Linear, NF4Weight, Weight, quantise

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


@given(rows=ROWS, kind=st.sampled_from(["4 bits", "tiled", "dense"]), data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_row_does_not_see_the_others(
    team: Team, rows: int, kind: str, data: st.DataObject
) -> None:
    """Any subset of the rows in any order, on any number of threads: the same bits."""
    # with rests: no whole number of outputs that go together, nor of registers
    outs, columns = {"4 bits": (96, 192), "tiled": (99, 192), "dense": (99, 203)}[kind]
    dense = DenseWeight(random((outs, columns), 3).bfloat16().to(team(1).dtype))
    weight: Weight = codes(outs, columns, 3) if kind == "4 bits" else dense
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


def test_gradients_flow_through_tiles(team: Team) -> None:
    """A trainer may multiply with the served weight."""
    tiles = tiled(codes(32, 64, 2), team(1), Arena())
    x = random((3, 64), 1).requires_grad_()
    tiles.matmul(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, tiles.dequantise(torch.float32).sum(0).expand(3, -1), atol=1e-5)
