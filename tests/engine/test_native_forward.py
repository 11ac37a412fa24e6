"""Whole steps of the native path: against torch's, and to the bit whatever the batch."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import families
from benchmarks.group_checkpoints import Recipe, write
from mora_serve.config import BaseConfig, EngineConfig
from mora_serve.core import AdapterWeight, Mixture, SamplingParams
from mora_serve.engine import native_forward
from mora_serve.engine.engine import Request
from mora_serve.engine.forward import Forward
from mora_serve.engine.native_forward import NativeForward
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence as Running
from mora_serve.engine.torch_forward import TorchForward
from mora_serve.errors import ConfigError
from mora_serve.model.attention import KVPages
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.native.library import PHASES, ModelStruct, StepStruct, targets

pytestmark = pytest.mark.skipif(
    not targets(torch.float32), reason="no compiler built the native path"
)
# two from files in 16 bits, whose weights are tiled: one with a tied head, one without; the last
# in groups of whole numbers, the head too, with inputs that go into groups by act-order
FAMILIES = ("llama3", "mistral", "qwen2", "qwen3", "llama3-16", "qwen2-16", "qwen2-groups")
GROUPS = Recipe(symmetric=False, act_order=True, group=32, head=True)
FLOAT_TARGETS = targets(torch.float32)
BF16_TARGETS = targets(torch.bfloat16)
ALL_TARGETS = [("fp32", t) for t in FLOAT_TARGETS] + [("bf16", t) for t in BF16_TARGETS]
PAGES, CONTEXT = 64, 128
# slot: (rank, DoRA); no adapter has the largest rank that slots have
ADAPTERS = {"a": (4, False), "b": (7, False), "c": (1, False), "d": (8, True), "e": (3, True)}
SLOT = {name: i + 1 for i, name in enumerate(ADAPTERS)}
SLOT_OF_DIGEST = {2 * name: slot for name, slot in SLOT.items()}
MIXTURES: tuple[dict[str, float], ...] = (
    *({}, {"a": 1.0}, {"b": -0.7}, {"d": 1.0}, {"a": 0.5, "b": 0.8}),
    *({"c": 1.5, "a": 1.0, "b": -0.25}, {"d": 0.6, "e": 0.4}, {"e": 0.9, "a": -0.3}),
)


@dataclass(frozen=True)
class Job:
    """A sequence, and the lengths of the chunks that it is computed in."""

    tokens: tuple[int, ...]
    mixture: dict[str, float]
    chunks: tuple[int, ...]


@functools.cache
def directory(family: str, root: Path) -> Path:
    name, _, bits = family.partition("-")
    if bits == "groups":
        return write(directory(name, root), root / family, GROUPS)
    # with 16 bits a vocabulary that does not fill its last tile
    model = families.make_base(name, root / family, vocab_size=333 if bits else 320)
    if bits:
        model.bfloat16().save_pretrained(root / family)
    return root / family


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@functools.cache
def reference(family: str, root: Path, quantization: str, dtype: str) -> Decoder:
    """Left as it is loaded; for torch."""
    return decoder(family, root, quantization, dtype)


def decoder(family: str, root: Path, quantization: str = "none", dtype: str = "fp32") -> Decoder:
    if family.endswith("groups"):
        quantization = "auto"
    config = BaseConfig(
        str(directory(family, root)), quantization=quantization, dtype=dtype, device="cpu"
    )
    return load_base(config).decoder


def adapters(decoder: Decoder, poison: int | None = None) -> AdapterSlots:
    """Random ones in slots 1 to 5 of 7, and NaN in slot ``poison``."""
    slots = AdapterSlots(decoder.shape, 7, 16, decoder.dtype, decoder.device)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, (rank, dora) in ADAPTERS.items():
        s = SLOT[name]
        slots.ranks[s], slots.has_dora[s] = rank, dora
        for part in slots.parts():
            part.a[s, :rank] = random(rank, part.a.shape[2]) * part.a.shape[2] ** -0.5
            part.b[s, :rank] = random(rank, part.width) * 0.1
            if dora:
                if part.dora is None:
                    part.dora = torch.zeros(slots.slots, part.width, dtype=slots.dtype)
                part.dora[s] = random(part.width) * 0.05
    for name, (_, dora) in ADAPTERS.items():
        for part in slots.parts():
            if not dora and part.dora is not None:
                part.dora[SLOT[name]] = 7.0  # of an adapter that was there before
    if poison is not None:
        slots.ranks[poison] = 16
        for part in slots.parts():
            part.a[poison] = part.b[poison] = float("nan")
            if part.dora is not None:
                part.dora[poison] = float("nan")
    return slots


def pages_of(decoder: Decoder, page_size: int, fill: float = 0.0) -> KVPages:
    shape = decoder.shape
    kv = KVPages(
        *(shape.layers, shape.kv_heads, shape.head_dim, PAGES * 16 // page_size, page_size),
        decoder.dtype,
        decoder.device,
    )
    kv.k.fill_(fill)
    kv.v.fill_(fill)
    return kv


class World:
    """A forward with its memory; ``run`` computes jobs side by side."""

    def __init__(
        self,
        decoder: Decoder,
        target: str | None = None,
        *,
        threads: int = 2,
        page_size: int = 16,
        fill: float = 0.0,
        poison: int | None = None,
    ) -> None:
        self.kv = pages_of(decoder, page_size, fill)
        self.slots = adapters(decoder, poison)
        self.forward: Forward = (
            TorchForward(decoder, self.slots, self.kv)
            if target is None
            else NativeForward(decoder, self.slots, self.kv, CONTEXT, threads, target)
        )

    def run(self, jobs: Sequence[Job]) -> list[Tensor]:
        """Logits at the end of every chunk of each job: [chunks, vocabulary]."""
        sequences, free = [], iter(range(1, self.kv.k.shape[2]))
        for i, job in enumerate(jobs):
            weights = tuple(AdapterWeight(n, w, 2 * n) for n, w in job.mixture.items())
            request = Request(
                *(f"r{i}", job.tokens, SamplingParams(1), Mixture(weights), "t", time.monotonic())
            )
            sequence = Running(request, None)  # type: ignore[arg-type]  # no text comes of it
            count = -(-len(job.tokens) // self.kv.page_size)
            # pages in no order
            sequence.pages = [next(free) for _ in range(count)][::-1]
            sequences.append(sequence)
        out: list[list[Tensor]] = [[] for _ in jobs]
        starts = [0] * len(jobs)
        for step in range(max(len(job.chunks) for job in jobs)):
            batch, who = [], []
            for i, job in enumerate(jobs):
                if step < len(job.chunks):
                    batch.append(Chunk(sequences[i], starts[i], job.chunks[step], True))
                    who.append(i)
                    starts[i] += job.chunks[step]
            order = sorted(range(len(batch)), key=lambda b: batch[b].length > 1)
            with torch.inference_mode():
                logits = self.forward([batch[b] for b in order], SLOT_OF_DIGEST.__getitem__)
            assert logits is not None
            assert logits.finite == [bool(x.isfinite().all()) for x in logits.values]
            finite = logits.values.nan_to_num()
            assert [b for b, f in zip(logits.best, logits.finite, strict=True) if f] == [
                int(x.argmax()) for x, f in zip(finite, logits.finite, strict=True) if f
            ]
            for row, b in enumerate(order):
                out[who[b]].append(logits.values[row].float().clone())
        return [torch.stack(rows) for rows in out]


def cut(length: int, pieces: Iterable[int]) -> tuple[int, ...]:
    """Lengths of chunks: ``pieces`` as far as they go, single tokens at last."""
    out: list[int] = []
    for piece in pieces:
        if sum(out) + piece <= length:
            out.append(piece)
    return (*out, *[1] * (length - sum(out)))


def job(length: int, mixture: dict[str, float], pieces: Iterable[int], seed: int = 0) -> Job:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 320, (length,), generator=generator).tolist()
    return Job(tuple(tokens), mixture, cut(length, pieces))


JOBS = [job(44 + i, m, [(1, 7, 30, 17, 40)[i % 5]], seed=i) for i, m in enumerate(MIXTURES)]


def distance(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative error; NaN if any number is."""
    errors = [(g - w).norm() / w.norm() for g, w in zip(got, want, strict=True)]
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("target", FLOAT_TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [4, 16])
def test_steps_compute_what_torch_computes(
    root: Path, family: str, target: str, page_size: int
) -> None:
    """Biases, norms of heads, a window shorter than the sequences, DoRA beside others."""
    want = World(reference(family, root, "none", "fp32"), page_size=page_size).run(JOBS)
    got = World(decoder(family, root), target, page_size=page_size).run(JOBS)
    assert distance(got, want) < 3e-6


@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_steps_on_a_four_bit_base(root: Path, target: str) -> None:
    """Against torch's products with the dequantised weights."""
    want = World(reference("llama3", root, "nf4", "fp32").dense()).run(JOBS)
    got = World(decoder("llama3", root, "nf4"), target).run(JOBS)
    assert distance(got, want) < 3e-6


@pytest.mark.parametrize("target", BF16_TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_bfloat16(root: Path, family: str, target: str) -> None:
    """No further from fp32 than torch's bfloat16 is, and a little."""
    exact = World(reference(family, root, "none", "fp32")).run(JOBS)
    torch_s = World(reference(family, root, "none", "bf16")).run(JOBS)
    got = World(decoder(family, root, dtype="bf16"), target).run(JOBS)
    assert distance(got, exact) < 1.2 * distance(torch_s, exact)


@pytest.mark.parametrize(("dtype", "target"), ALL_TARGETS)
@given(data=st.data())
@settings(deadline=None, max_examples=12)
def test_the_rest_of_a_batch_does_not_change_a_bit(
    root: Path, dtype: str, target: str, data: st.DataObject
) -> None:
    """Alone on one thread in single tokens, or in chunks beside others on three: equal bits."""
    family = data.draw(st.sampled_from(FAMILIES))
    length = data.draw(st.integers(2, 50))
    mixture = data.draw(st.sampled_from(MIXTURES))
    pieces = data.draw(st.lists(st.integers(1, 40), max_size=4))
    seed = data.draw(st.integers(0, 99))
    alone = job(length, mixture, [], seed)
    chunked = job(length, mixture, pieces, seed)
    others = [
        job(data.draw(st.integers(1, 30)), data.draw(st.sampled_from(MIXTURES)), [5], seed + 1 + i)
        for i in range(data.draw(st.integers(0, 5)))
    ]
    place = data.draw(st.integers(0, len(others)))
    threads = data.draw(st.integers(1, 3))
    page_size = data.draw(st.sampled_from([4, 16]))
    (want,) = World(decoder(family, root, dtype=dtype), target, threads=1, page_size=16).run(
        [alone]
    )
    world = World(decoder(family, root, dtype=dtype), target, threads=threads, page_size=page_size)
    got = world.run([*others[:place], chunked, *others[place:]])[place]
    ends = torch.tensor(chunked.chunks).cumsum(0) - 1
    assert torch.equal(got, want[ends])


@pytest.mark.parametrize(("dtype", "target"), ALL_TARGETS)
def test_nobody_s_numbers_reach_another(root: Path, dtype: str, target: str) -> None:
    """Pages full of NaN, a slot of NaN, and a row that is NaN itself."""
    want = World(decoder("llama3", root, dtype=dtype), target).run(JOBS)
    world = World(decoder("llama3", root, dtype=dtype), target, fill=float("nan"), poison=6)
    assert all(torch.equal(g, w) for g, w in zip(world.run(JOBS), want, strict=True))
    for i in (0, len(JOBS)):
        world = World(
            decoder("llama3", root, dtype=dtype), target, fill=float("nan"), poison=SLOT["c"]
        )
        bad = job(20, {"c": 1.0}, [9], seed=50)
        clean = [(n, j) for n, j in enumerate(JOBS) if "c" not in j.mixture]
        jobs = [j for _, j in clean]
        got = world.run([*jobs[:i], bad, *jobs[i:]])
        spoiled = got.pop(min(i, len(jobs)))
        assert not spoiled.isfinite().any()
        assert all(torch.equal(g, want[n]) for g, (n, _) in zip(got, clean, strict=True))


def test_a_step_without_memory_is_an_error(root: Path) -> None:
    """A workspace larger than any machine; the next step on the same team is as before."""
    world = World(decoder("llama3", root), FLOAT_TARGETS[0])
    assert isinstance(world.forward, NativeForward)
    want = world.run(JOBS)
    huge = ModelStruct(heads=1, kv_heads=1, head_dim=1, hidden=1 << 30, intermediate=1 << 30)
    with pytest.raises(MemoryError):
        world.forward.native.forward(huge, StepStruct(rows=1 << 30))
    assert all(torch.equal(g, w) for g, w in zip(world.run(JOBS), want, strict=True))


@pytest.mark.parametrize("family", ["llama3-16", "qwen2-16"])
def test_torch_reads_tables_in_tiles(root: Path, family: str) -> None:
    """Embedding and head of a decoder that the native path runs: equal, in half the bytes."""
    plain, tiled = reference(family, root, "none", "fp32"), decoder(family, root)
    World(tiled, FLOAT_TARGETS[0])
    assert (tiled.embedding is tiled.head) == (family == "llama3-16")
    tokens, hidden = torch.tensor([0, 332, 17, 17]), torch.randn(3, plain.shape.hidden_size)
    assert torch.equal(
        tiled.embedding.rows(tokens, torch.float32), plain.embedding.rows(tokens, torch.float32)
    )
    assert torch.allclose(tiled.logits(hidden), plain.logits(hidden), atol=1e-5)
    assert tiled.embedding.nbytes == 336 * 128 * 2


def test_steps_of_many_rows_and_of_many_adapters_alternate(root: Path) -> None:
    """A workspace that grew for the one has room for the other; the numbers stay."""
    world = World(decoder("qwen3", root), FLOAT_TARGETS[0])
    long = [job(120, {}, [120], seed=9)]
    many = [job(6, MIXTURES[5], [6], seed=i) for i in range(20)]
    first = world.run(long), world.run(many)
    for _ in range(2):
        for jobs, want in zip((long, many), first, strict=True):
            assert all(map(torch.equal, world.run(jobs), want))


def test_dora_scales_that_come_later_are_used(root: Path) -> None:
    """Slots have no memory for them until a DoRA adapter is loaded, be it after the first step."""
    want = World(decoder("llama3", root), FLOAT_TARGETS[0]).run(JOBS)
    world = World(decoder("llama3", root), FLOAT_TARGETS[0])
    parts = list(world.slots.parts())
    scales = [part.dora for part in parts]
    for part in parts:
        part.dora = None
    world.slots.has_dora[:] = [False] * world.slots.slots
    world.forward = NativeForward(
        decoder("llama3", root), world.slots, world.kv, CONTEXT, 2, FLOAT_TARGETS[0]
    )
    without = world.run(JOBS)
    for part, dora in zip(parts, scales, strict=True):
        part.dora = dora
    for name, (_, scaled) in ADAPTERS.items():
        world.slots.has_dora[SLOT[name]] = scaled
    assert all(map(torch.equal, world.run(JOBS), want))
    assert not all(map(torch.equal, without, want))


def test_time_is_told_by_phase(root: Path) -> None:
    """Every phase takes some."""
    import numpy as np

    world = World(decoder("llama3", root), FLOAT_TARGETS[0])
    assert isinstance(world.forward, NativeForward)
    world.forward.seconds = np.zeros(len(PHASES))
    world.run(JOBS)
    assert (world.forward.seconds > 0).all()


class TestChoice:
    """engine.kernels."""

    def chosen(self, root: Path, kernels: str) -> Forward:
        from mora_serve.config import AdaptersConfig, Config
        from mora_serve.engine.engine import Engine

        base = BaseConfig(
            str(directory("llama3", root)), quantization="none", dtype="fp32", device="cpu"
        )
        config = Config(base, EngineConfig(kernels=kernels), AdaptersConfig(slots=2))
        engine = Engine(load_base(base), config, lambda digest: None)  # type: ignore[arg-type,return-value]
        engine.stop()
        return engine.runner.forward

    def test_the_native_path_where_it_is_there(self, root: Path) -> None:
        assert isinstance(self.chosen(root, "auto"), NativeForward)
        assert isinstance(self.chosen(root, "native"), NativeForward)
        assert isinstance(self.chosen(root, "torch"), TorchForward)

    def test_torch_where_it_is_not(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(native_forward, "targets", lambda dtype: [])
        assert isinstance(self.chosen(root, "auto"), TorchForward)
        with pytest.raises(ConfigError, match="'native' asks for the compiled CPU path"):
            self.chosen(root, "native")
