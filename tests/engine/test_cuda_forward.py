"""Steps by kernels against torch's: on a card with graphs, elsewhere in Triton's interpreter.

Without a card the function that a graph would hold is called itself; the capture is all that is
missing then.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import Mixture, Request, SamplingParams
from mora_serve.engine import runner
from mora_serve.engine.cuda_forward import CudaForward, buckets, tile_sizes
from mora_serve.engine.forward import Forward
from mora_serve.engine.sampler import SamplingRow, sample
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence as Running
from mora_serve.errors import ConfigError
from mora_serve.model.attention import KVPages
from mora_serve.model.decoder import Decoder
from mora_serve.model.kernels.products import Products, known_ways
from mora_serve.model.lora import AdapterSlots
from tests.engine.steps import (
    CONTEXT,
    MIXTURES,
    SLOT,
    World,
    decoder,
    distance,
    job,
    reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# decodes beside prompts of several chunks, then decodes alone; a row that ends before the others
JOBS = [job(18 + i, m, [(1, 7, 13, 16, 15)[i % 5]], seed=i) for i, m in enumerate(MIXTURES)]
FEW = [job(9 + i, MIXTURES[i], [7 + i], seed=20 + i) for i in (1, 3, 4)]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def base(family: str, root: Path, quantization: str = "none", dtype: str = "fp32") -> Decoder:
    return reference(family, root, quantization, dtype, DEVICE)


def by_kernels(
    product: Products | None = None, max_batch: int = 8
) -> Callable[[Decoder, AdapterSlots, KVPages], Forward]:
    return lambda *parts: CudaForward(*parts, CONTEXT, max_batch, 4, product)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_steps_compute_what_torch_computes(root: Path, family: str) -> None:
    """Biases, norms of heads, a window shorter than the sequences, DoRA beside others."""
    model = base(family, root)
    size = 4 if family == "mistral" else 16
    want = World(model, page_size=size).run(JOBS)
    got = World(model, by_kernels(), page_size=size).run(JOBS)
    assert distance(got, want) < 1e-5


def test_steps_in_bfloat16_are_no_further_from_fp32_than_torch_s(root: Path) -> None:
    exact = World(base("llama3", root)).run(FEW)
    torch_s = World(base("llama3", root, dtype="bf16")).run(FEW)
    got = World(base("llama3", root, dtype="bf16"), by_kernels()).run(FEW)
    assert distance(got, exact) < 1.5 * distance(torch_s, exact)


@pytest.mark.parametrize("way", ["kernel, table", "dense"])
def test_every_way_of_four_bit_products_gives_the_same_steps(root: Path, way: str) -> None:
    model = base("llama3", root, "nf4")
    want = World(model.dense()).run(FEW)
    product = Products(known_ways(model.device, model.dtype), way)
    got = World(model, by_kernels(product)).run(FEW)
    assert distance(got, want) < 1e-5


def test_nobody_s_numbers_reach_another(root: Path) -> None:
    """Pages full of NaN, a slot of NaN, and a row that is NaN itself."""
    model = base("llama3", root)
    want = World(model, by_kernels()).run(FEW)
    world = World(model, by_kernels(), fill=float("nan"), poison=6)
    assert all(map(torch.equal, world.run(FEW), want))
    bad = job(10, {"c": 1.0}, [9], seed=50)
    world = World(model, by_kernels(), fill=float("nan"), poison=SLOT["c"])
    got = world.run([*FEW[:1], bad, *FEW[1:]])
    assert not got.pop(1).isfinite().any()
    assert distance(got, want) < 1e-5


def test_padding_writes_nowhere_and_changes_nobody(root: Path) -> None:
    """Three rows in a bucket of four: pages of nobody stay as they were."""
    model = base("llama3", root)
    world = World(model, by_kernels(), fill=7.0)
    padded = world.run(FEW)
    used = sum(-(-len(j.tokens) // 16) for j in FEW)
    assert bool((world.kv.k[:, :, 0] == 7).all())
    assert bool((world.kv.v[:, :, used + 1 :] == 7).all())
    assert distance(padded, World(model).run(FEW)) < 1e-5


def test_two_runs_are_equal_to_the_bit(root: Path) -> None:
    model = base("llama3", root)
    first, second = (World(model, by_kernels()).run(FEW) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_dora_scales_that_come_later_are_used(root: Path) -> None:
    """They get memory after the first steps; graphs of before are not used any more."""
    model = base("llama3", root)
    scaled = [job(8, {"d": 1.0}, [6], seed=1), job(7, {"d": 0.6, "a": 1.0}, [6], seed=2)]
    want = World(model).run(scaled)
    world = World(model, by_kernels())
    parts = list(world.slots.parts())
    scales, flags = [p.dora for p in parts], list(world.slots.has_dora)
    for part in parts:
        part.dora = None
    world.slots.has_dora[:] = [False] * len(flags)
    without = world.run(scaled)
    for part, dora in zip(parts, scales, strict=True):
        part.dora = dora
    world.slots.has_dora[:] = flags
    assert distance(world.run(scaled), want) < 1e-5
    assert distance(without, want) > 1e-3


def running(number: int, params: SamplingParams, answered: int) -> Running:
    prompt = tuple(range(10 + number, 20 + number))
    request = Request(f"r{number}", prompt, params, Mixture(), "t", time.monotonic())
    sequence = Running(request, None)  # type: ignore[arg-type]  # no text comes of it
    for i in range(answered):
        sequence.append(30 + i)
    sequence.pages = [1 + 4 * number + i for i in range(4)]
    return sequence


def test_tokens_are_those_of_the_sampler(root: Path) -> None:
    """Greedy and drawn rows here, filtered and penalised ones by the sampler on these logits."""
    world = World(base("llama3", root), by_kernels())
    wanted: Sequence[SamplingParams] = [
        SamplingParams(),
        SamplingParams(temperature=1.3, seed=5),
        SamplingParams(temperature=0.7, seed=-9),
        SamplingParams(temperature=2.0, seed=(1 << 64) - 3),
        SamplingParams(temperature=1.0, seed=5, top_k=4),
        SamplingParams(temperature=1.0, seed=5, logprobs=2),
        SamplingParams(repetition_penalty=1.5),
    ]
    sequences = [running(i, params, i % 3) for i, params in enumerate(wanted)]
    prompts = [Chunk(s, 0, len(s.tokens) - 1, False) for s in sequences]
    decodes = [Chunk(s, len(s.tokens) - 1, 1, True) for s in sequences]
    whole = [Chunk(s, 0, len(s.tokens), True) for s in sequences]
    with torch.inference_mode():
        assert world.forward(prompts, {}.__getitem__) is None
        for batch in (decodes, whole):
            logits = world.forward(batch, {}.__getitem__)
            assert logits is not None
            assert list(logits.drawn) == [1, 2, 3]
            values = logits.values.cpu()
            rows = [SamplingRow(s.request.sampling, s.request.prompt, s.output) for s in sequences]
            assert logits.best[:4] == [token.id for token in sample(values[:4], rows[:4])]
            assert logits.best[4:] == values[4:].argmax(-1).tolist()
            assert torch.equal(logits.read([5, 1]).cpu(), values[[5, 1]])


def test_a_chunk_that_does_not_sample_is_computed_all_the_same(root: Path) -> None:
    """Single tokens of prompts, as isolation cuts them, and a step in which nobody samples."""
    model = base("llama3", root)

    def last(make: Callable[..., Forward] | None) -> torch.Tensor:
        world = World(model) if make is None else World(model, make)
        one, two = (running(i, SamplingParams(), 0) for i in range(2))
        with torch.inference_mode():
            for at in range(9):
                assert world.forward([Chunk(one, at, 1, False)], {}.__getitem__) is None
            both = [Chunk(two, 0, 1, False), Chunk(one, 9, 1, True)]
            logits = world.forward(both, {}.__getitem__)
        assert logits is not None
        return logits.values.cpu().clone()

    got, want = last(by_kernels()), last(None)
    assert got.shape == want.shape == (1, 320)
    assert distance([got], [want]) < 1e-5


def test_compiling_ahead_leaves_no_trace(root: Path) -> None:
    """Prompts of padding run through every kernel, and no page is written."""
    model = base("llama3", root)
    world = World(model, by_kernels(), fill=7.0)
    assert isinstance(world.forward, CudaForward)
    world.forward.compile_prompts((5,))
    assert bool((world.kv.k == 7).all())
    assert bool((world.kv.v == 7).all())
    world.kv.k.zero_()
    world.kv.v.zero_()
    assert all(map(torch.equal, world.run(FEW), World(model, by_kernels()).run(FEW)))


def test_buckets_reach_the_largest_batch_with_little_padding() -> None:
    for most in (1, 5, 8, 64, 200):
        found = buckets(most)
        assert found[-1] == most
        assert all(b <= max(2 * a, a + 32) for a, b in itertools.pairwise(found))
    assert buckets(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]


def test_preparing_covers_every_layout_of_a_bucket() -> None:
    assert tile_sizes(1, 1) == [1]
    assert tile_sizes(8, 4) == [1, 16]
    assert tile_sizes(64, 1) == [1, 16, 64]


class TestServing:
    """The engine on kernels."""

    SAMPLING = (
        SamplingParams(12, ignore_eos=True),
        SamplingParams(12, temperature=0.9, seed=3, ignore_eos=True),
        SamplingParams(12, temperature=0.9, top_p=0.8, seed=3, ignore_eos=True),
    )

    def config(self, root: Path, kernels: str) -> Config:
        decoder("llama3", root)  # writes it
        return Config(
            BaseConfig(str(root / "llama3"), quantization="none", dtype="fp32", device=DEVICE),
            EngineConfig(max_batch=4, kernels=kernels, kv_pages=40, step_tokens=16),  # type: ignore[arg-type]
            AdaptersConfig(slots=4),
        )

    def answers(self, root: Path, kernels: str) -> list[list[int]]:
        with LocalEngine(self.config(root, kernels)) as local:
            local.engine.warm_up()
            prompts = [list(range(5 + i, 5 + i + 9 * (i + 1))) for i in range(5)]
            jobs = [(p, {}, self.SAMPLING[i % 3]) for i, p in enumerate(prompts)]
            return local.generate(jobs)

    def test_answers_are_those_of_torch(self, root: Path) -> None:
        assert self.answers(root, "triton") == self.answers(root, "torch")

    def test_without_triton_it_is_said(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="not installed"):
            LocalEngine(self.config(root, "triton"))

    @pytest.mark.skipif(DEVICE == "cuda", reason="there is a card")
    def test_without_a_card_it_is_said(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ConfigError, match="need a card"):
            LocalEngine(self.config(root, "triton"))
