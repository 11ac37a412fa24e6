"""The mixed adapter product by kernels against its formula in float64, row by row.

Without a card Triton interprets the kernels, on small shapes; the tests marked ``gpu`` do the same
on large ones.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from mora_serve.model.int8_slots import Int8Slots
from mora_serve.model.kernels.mixed_lora import KernelAdapters
from mora_serve.model.kernels.mixtures import (
    LARGE,
    SMALL,
    TILE_ROWS,
    VECTOR,
    VECTOR_ENTRIES,
    MixtureBuffers,
)
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.shape import SITES, ModelShape
from tests.model.kernels.compiling import SHARED_LIMIT, compiled

SMALL_SHAPE = ModelShape("llama", 32, 40, 72, 1, 4, 2, 11, 64, 1e-6)
LARGE_SHAPE = ModelShape("llama", 32, 1048, 3000, 1, 9, 3, 120, 64, 1e-6)
Mixtures = Sequence[tuple[tuple[int, float], ...]]


def make_slots(
    shape: ModelShape,
    ranks: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    dora: Sequence[bool] = (),
) -> AdapterSlots:
    """Slots of these ranks, DoRA where ``dora`` says so, but for one projection; NaN elsewhere."""
    generator = torch.Generator().manual_seed(len(ranks) + sum(ranks))
    slots = AdapterSlots(shape, len(ranks), max(ranks), dtype, device)
    slots.ranks[:] = ranks
    for part in slots.parts():
        for slot, rank in enumerate(ranks):
            a = torch.randn(rank, part.a.shape[2], generator=generator) * part.a.shape[2] ** -0.5
            part.a[slot, :rank] = a.to(device, dtype)
            b = torch.randn(rank, part.width, generator=generator) * rank**-0.5
            part.b[slot, :rank] = b.to(device, dtype)
    for part in slots.parts():
        part.dora.fill_(float("nan"))
    for slot, has in enumerate(dora):
        slots.has_dora[slot] = has
        for site, parts in slots.layers[0].items():
            for i, part in enumerate(parts):
                if has:
                    c = torch.rand(part.width, generator=generator) - 0.5
                    part.dora[slot] = 0 if site == "gate_up" and i else c.to(device, dtype)
    return slots


def inputs(slots: AdapterSlots, site: str, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = slots.layers[0][site]
    x = torch.randn(rows, parts[0].a.shape[2], generator=generator)
    y = torch.randn(rows, sum(p.width for p in parts), generator=generator)
    return x.to(slots.device, slots.dtype), y.to(slots.device, slots.dtype)


def formula(
    slots: AdapterSlots, site: str, x: Tensor, y: Tensor, rows: Mixtures
) -> tuple[Tensor, Tensor]:
    """The result in float64, and the sum of the magnitudes of what was added up to it."""
    want, size = y.double(), y.double().abs()
    end = 0
    for mixture, run in itertools.groupby(rows):
        start, end = end, end + len(list(run))
        for (slot, weight), part in itertools.product(mixture, slots.layers[0][site]):
            here = slice(start, end), slice(part.start, part.start + part.width)
            rank = slots.ranks[slot]
            h = x[start:end].double() @ part.a[slot, :rank].double().T
            b = part.b[slot, :rank].double()
            delta, reach = h @ b, h.abs() @ b.abs()
            if slots.has_dora[slot]:
                c = part.dora[slot].double()
                delta = delta + c * (delta + y[here].double())
                reach = reach + c.abs() * (reach + y[here].double().abs())
            want[here] += weight * delta
            size[here] += abs(weight) * reach
    return want, size


def kernel_adapters(slots, rows: int, widest: int = 4) -> KernelAdapters:
    buffers = MixtureBuffers(rows, widest, len(slots.ranks), slots.device)
    return KernelAdapters(slots, buffers)


def by_row(mixtures: Mixtures, lengths: Sequence[int]) -> Mixtures:
    return [mixture for mixture, n in zip(mixtures, lengths, strict=True) for _ in range(n)]


def tolerance(dtype: torch.dtype) -> float:
    """Of the magnitudes: two roundings of 16 bits (inner product, y), or float32's sums."""
    return 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Step:
    """One step: adapters' ranks, and how many adapters each chunk has."""

    name: str
    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    lengths: tuple[int, ...]
    dora: tuple[bool, ...] = ()

    def mixtures(self) -> list[tuple[tuple[int, float], ...]]:
        random_ = random.Random(self.name)
        return [
            tuple(
                (slot, random_.uniform(-2, 2))
                for slot in random_.sample(range(len(self.ranks)), size)
            )
            for size in self.sizes
        ]


def check(shape, step: Step, dtype, sizes: Sequence[int], device, sites=tuple(SITES)) -> None:
    """With tiles of each of ``sizes``: within rounding, alike twice, idle rows as they were."""
    slots = make_slots(shape, step.ranks, dtype, device, step.dora)
    mixtures = step.mixtures()
    rows = by_row(mixtures, step.lengths)
    adapters = kernel_adapters(slots, len(rows) + -len(rows) % 16)
    idle = [row for row, mixture in enumerate(rows) if not mixture]
    for site in sites:
        x, y = inputs(slots, site, len(rows))
        want, size = formula(slots, site, x, y, rows)
        for tile_rows in sizes:
            adapters.fill(mixtures, step.lengths, tile_rows)
            got = adapters.apply(0, site, x, y.clone())
            assert torch.equal(got, adapters.apply(0, site, x, y.clone()))
            worst = ((got.double() - want).abs() / size).max().item()
            assert worst <= tolerance(dtype), (site, tile_rows)
            assert torch.equal(got[idle], y[idle])


SMALL_STEPS = [
    Step("decode", (1, 16, 3, 40, 8), (1, 0, 2, 4), (1, 1, 1, 1)),
    Step("prefill", (5, 17, 33), (2, 1, 0, 1), (6, 1, 2, 18)),
    Step("wide", (128, 1), (1, 2, 1), (1, 1, 1)),
    Step("dora", (4, 9, 2), (3, 1, 2), (1, 2, 1), (True, False, True)),
]


@pytest.mark.parametrize("step", SMALL_STEPS, ids=lambda step: step.name)
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_every_row_gets_its_own_mixture(step: Step, tile_rows: int, device: torch.device):
    """Two runs are alike to the bit, and rows without adapters are not touched."""
    sites = {"decode": ("qkv",), "prefill": ("o",), "wide": ("down",), "dora": ("gate_up",)}
    chosen = tuple(SITES) if tile_rows == SMALL and step.name == "dora" else sites[step.name]
    check(SMALL_SHAPE, step, torch.float32, [tile_rows], device, chosen)


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_long_rows_are_done_in_parts(tile_rows: int, device: torch.device):
    """More columns than a partial sum takes, more outputs than a program."""
    shape = replace(SMALL_SHAPE, hidden_size=2100, intermediate_size=300)
    step = Step("long", (3, 20), (2, 1), (1, 2), (False, True))
    check(shape, step, torch.float32, [tile_rows], device, ("gate_up",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_sixteen_bits_are_within_their_rounding(dtype, tile_rows: int, device: torch.device):
    check(SMALL_SHAPE, SMALL_STEPS[-1], dtype, [tile_rows], device, ("qkv",))


def large_steps() -> list[Step]:
    """Ranks 1 to 128, 1 to 128 adapters, mixtures of 0 to 4, odd lengths, some with DoRA."""
    random_ = random.Random(7)
    steps = []
    for i, adapters in enumerate((1, 2, 5, 16, 33, 128)):
        ranks = tuple(random_.choice((1, 2, 7, 8, 16, 33, 64, 128)) for _ in range(adapters))
        for kind in ("decode", "prefill"):
            chunks = random_.randint(1, 70) if kind == "decode" else random_.randint(1, 7)
            sizes = tuple(random_.randint(0, min(4, adapters)) for _ in range(chunks))
            lengths = tuple(1 if kind == "decode" else random_.randint(1, 97) for _ in sizes)
            dora = tuple(random_.random() < 0.3 for _ in ranks) if i % 2 else ()
            steps.append(Step(f"{kind}-{adapters}", ranks, sizes, lengths, dora))
    return steps


@pytest.mark.gpu
@pytest.mark.parametrize("step", large_steps(), ids=lambda step: step.name)
def test_large_shapes_on_a_card(step: Step):
    check(LARGE_SHAPE, step, torch.bfloat16, TILE_ROWS, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("step", large_steps()[-2:], ids=lambda step: step.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_types_on_a_card(step: Step, dtype: torch.dtype):
    check(LARGE_SHAPE, step, dtype, TILE_ROWS, torch.device("cuda"), ("qkv",))


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_a_row_does_not_depend_on_what_else_is_in_the_batch(tile_rows: int, device: torch.device):
    """To the bit, and wherever it stands."""
    slots = make_slots(SMALL_SHAPE, (20, 3, 16), torch.float32, device)
    mine = ((2, 0.5), (0, -1.5))
    x, y = inputs(slots, "qkv", 6)
    adapters = kernel_adapters(slots, 6)
    adapters.fill([((1, 1.0),), mine, ((0, 1.0), (2, 1.0)), (), mine], [1, 1, 2, 1, 1], tile_rows)
    full = adapters.apply(0, "qkv", x, y.clone())
    for row in (1, 5):
        adapters.fill([mine], [1], tile_rows)
        here = slice(row, row + 1)
        assert torch.equal(adapters.apply(0, "qkv", x[here], y[here].clone())[0], full[row])


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_adapters_are_added_in_the_mixtures_order_whatever_their_slots(
    tile_rows: int, device: torch.device
):
    """After a restart adapters stand in other slots, and an answer is what it was."""
    slots = make_slots(SMALL_SHAPE, (6, 6, 6), torch.float32, device)
    x, y = inputs(slots, "o", 2)
    adapters = kernel_adapters(slots, 2)
    adapters.fill([((0, 0.3), (1, 0.7), (2, -1.1))] * 2, [1, 1], tile_rows)
    before = adapters.apply(0, "o", x, y.clone())
    for part in slots.parts():
        part.a[:] = part.a.flip(0)
        part.b[:] = part.b.flip(0)
    adapters.fill([((2, 0.3), (1, 0.7), (0, -1.1))] * 2, [1, 1], tile_rows)
    assert torch.equal(adapters.apply(0, "o", x, y.clone()), before)


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_nan_stays_in_its_adapter_and_its_row(tile_rows: int, device: torch.device):
    """Beyond an adapter's rank, in a slot that nobody uses, in another row: nothing is read."""
    slots = make_slots(SMALL_SHAPE, (4, 7, 3, 7), torch.float32, device)
    for part in slots.parts():
        part.a[2], part.b[2] = float("nan"), float("nan")
        part.a[0, 4:], part.b[0, 4:] = float("nan"), float("inf")
    x, y = inputs(slots, "qkv", 7)
    x[5] = float("nan")
    mixtures = [((0, 1.0),), ((2, 1.0), (1, 1.0)), ((1, 1.0),), (), ((0, 1.0), (3, 2.0))]
    adapters = kernel_adapters(slots, 7)
    adapters.fill([*mixtures, ((0, 1.0),), ((0, 1.0),)], [1] * 7, tile_rows)
    got = adapters.apply(0, "qkv", x, y.clone())
    assert torch.isnan(got[[1, 5]]).all()
    assert torch.isfinite(got[[0, 2, 3, 4, 6]]).all()


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_nothing_is_left_of_the_step_before(tile_rows: int, device: torch.device):
    """A graph's launches are made for the most; what a step does not use they leave alone."""
    slots = make_slots(SMALL_SHAPE, (4, 30, 3), torch.float32, device)
    x, y = inputs(slots, "down", 5)
    adapters = kernel_adapters(slots, 5)
    adapters.fill([((0, 1.0), (1, 1.0), (2, 1.0))] * 5, [1] * 5, tile_rows)
    adapters.apply(0, "down", x, y.clone())
    adapters.fill([(), ((2, 2.0),)], [1, 1], tile_rows)
    got = adapters.apply(0, "down", x, y.clone())
    want, _ = formula(slots, "down", x, y, [(), ((2, 2.0),)])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[[0, 2, 3, 4]], y[[0, 2, 3, 4]])
    adapters.fill([()], [5], tile_rows)
    assert torch.equal(adapters.apply(0, "down", x, y.clone()), y)


@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_inner_products_stay_in_their_memory(tile_rows: int, device: torch.device):
    """Also where there is room for more entries than tiles of one row may have."""
    slots = make_slots(replace(SMALL_SHAPE, hidden_size=1500), (1, 1), torch.float32, device)
    adapters = kernel_adapters(slots, VECTOR_ENTRIES // 2)
    size = len(adapters._inner)
    memory = torch.full((4 * size,), 7.0, device=device)
    adapters._inner = memory[:size]
    adapters.fill([((0, 1.0), (1, 1.0))], [2], tile_rows)
    adapters.apply(0, "qkv", *inputs(slots, "qkv", 2))
    assert not memory[:size].eq(7).all()
    assert memory[size:].eq(7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_int8_adapters_give_what_their_numbers_say(
    tile_rows: int, dtype: torch.dtype, device: torch.device
):
    slots = make_slots(SMALL_SHAPE, (5, 18), dtype, device, (True, False))
    small = Int8Slots.of(SMALL_SHAPE, slots)
    mixtures = [((0, 1.0), (1, -0.5)), (), ((1, 2.0),)]
    adapters = kernel_adapters(small, 3)
    adapters.fill(mixtures, [1, 1, 1], tile_rows)
    for sites in slots.layers:
        for site in sites:
            for part, rounded in zip(sites[site], small.layers[0][site], strict=True):
                part.a, part.b = rounded.factors(slice(None), 18, torch.float32)
    for site in ("qkv", "gate_up"):
        x, y = inputs(slots, site, 3)
        got = adapters.apply(0, site, x, y.clone())
        want, size = formula(slots, site, x, y, mixtures)
        assert ((got.double() - want).abs() / size).max() <= tolerance(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("tile_rows", TILE_ROWS)
def test_a_captured_graph_does_whatever_mixture_is_filled_in(tile_rows: int, early: bool):
    if early and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this card has no early launches")
    device = torch.device("cuda")
    slots = make_slots(LARGE_SHAPE, (16, 64, 3, 128), torch.bfloat16, device, (False, True))
    x, y = inputs(slots, "qkv", 32)
    adapters = KernelAdapters(slots, MixtureBuffers(32, 4, 4, device), early)
    out = y.clone()
    adapters.fill([()], [32], tile_rows)
    adapters.apply(0, "qkv", x, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(y)
        adapters.apply(0, "qkv", x, out)
    for seed in range(5):
        random_ = random.Random(seed)
        mixtures = [
            tuple((s, random_.uniform(-1, 1)) for s in random_.sample(range(4), size))
            for size in (random_.randint(0, 4) for _ in range(32))
        ]
        adapters.fill(mixtures, [1] * 32, tile_rows)
        graph.replay()
        assert torch.equal(out, adapters.apply(0, "qkv", x, y.clone()))
        want, size = formula(slots, "qkv", x, y, mixtures)
        assert ((out.double() - want).abs() / size).max() <= tolerance(torch.bfloat16)


def launch(site: str, tile_rows: int, scaled: bool = False, early: bool = False) -> None:
    """A site of a Llama of 8 billion parameters."""
    meta = torch.device("meta")
    shape = ModelShape("llama", 128256, 4096, 14336, 1, 32, 8, 128, 8192, 1e-5)
    form = Int8Slots if scaled else AdapterSlots
    slots = form(shape, 32, 64, torch.bfloat16, meta)
    buffers = MixtureBuffers(64, 4, 32, meta)
    buffers.tile_rows = tile_rows
    adapters = KernelAdapters(slots, buffers, early)
    parts = slots.layers[0][site]
    x = torch.empty(64, parts[0].a.shape[2], dtype=torch.bfloat16, device=meta)
    y = torch.empty(64, sum(part.width for part in parts), dtype=torch.bfloat16, device=meta)
    adapters.apply(0, site, x, y)


LAUNCHES: dict[str, Callable[[], None]] = {
    "rows": partial(launch, "qkv", VECTOR),
    "rows-int8": partial(launch, "qkv", VECTOR, scaled=True),
    "small": partial(launch, "gate_up", SMALL, scaled=True),
    "large": partial(launch, "qkv", LARGE),
    "early": partial(launch, "down", VECTOR, early=True),
}


def test_the_kernels_compile_for_cards_that_are_not_here():
    """Nothing spills out of the registers; tiles are multiplied by tensor cores."""
    architectures = dict.fromkeys(LAUNCHES, (90,)) | dict.fromkeys(("rows-int8", "small"), (80, 90))
    for (case, architecture), kernels in compiled(__name__, architectures).items():
        assert [kernel.kernel for kernel in kernels] == ["shrink", "expand"]
        for kernel in kernels:
            assert not kernel.error, case
            assert kernel.shared <= SHARED_LIMIT[architecture], case
            assert kernel.stack == 0, case
            assert kernel.tensor_cores == (case in ("small", "large")), case
