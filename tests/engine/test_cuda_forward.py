"""Steps by kernels against torch's: on a card with graphs, elsewhere in Triton's interpreter.

Without a card the function that a graph would hold is called itself; the capture is all that is
missing then.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import families
from benchmarks.group_checkpoints import write
from benchmarks.local import LocalEngine
from benchmarks.many_adapters import Template
from mora_serve.adapters.validate import read_upload
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import Mixture, Request, SamplingParams
from mora_serve.engine import runner
from mora_serve.engine.cuda_forward import CudaForward
from mora_serve.engine.forward import Forward
from mora_serve.engine.graphs import Capture, Variant
from mora_serve.engine.kernel_step import KernelStep, Room, buckets, tile_sizes
from mora_serve.engine.sampler import SamplingRow, sample
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence as Running
from mora_serve.errors import ConfigError
from mora_serve.model.attention import KVPages
from mora_serve.model.decoder import Decoder
from mora_serve.model.group_quant import GroupWeight
from mora_serve.model.kernels.products import Products, known_ways
from mora_serve.model.loading import load_base
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.shape import PROJECTIONS
from tests.engine.faults import FaultyCapture
from tests.engine.steps import CONTEXT, GROUPS, MIXTURES, SLOT, World, distance, job

CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"
# Prompts, then decodes beside a prompt, then decodes; in the interpreter a token takes a while.
FEW = (
    job(4, {}, [3]),
    job(4, {"a": 0.5, "b": 0.8}, [3], seed=1),
    job(5, {"d": 0.6, "e": 0.4}, [1, 3], seed=2),
)
MANY = [job(44 + i, m, [(1, 7, 30, 17, 40)[i % 5]], seed=i) for i, m in enumerate(MIXTURES)]
JOBS = MANY if CARD else FEW
CHANGES: dict[str, dict[str, Any]] = {
    "llama3": {},
    "small": {"num_hidden_layers": 1},
    "mistral": {"num_hidden_layers": 1, "sliding_window": 3, "num_key_value_heads": 1},
    "qwen2": {"num_hidden_layers": 1},
    "qwen3": {"num_hidden_layers": 1},
}


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@functools.cache
def directory(family: str, root: Path) -> Path:
    name = "llama3" if family == "small" else family
    families.make_base(name, root / family, **CHANGES[family])
    return root / family


@functools.cache
def base(
    family: str, root: Path, quantization: Literal["none", "nf4"] = "none", dtype: Any = "fp32"
) -> Decoder:
    place = str(directory(family, root))
    return load_base(BaseConfig(place, "main", quantization, dtype, DEVICE)).decoder


def by_kernels(
    product: Products | None = None, max_batch: int = 8, capture: Capture | None = None
) -> Callable[[Decoder, AdapterSlots, KVPages], Forward]:
    room = Room(CONTEXT, max_batch, 4)
    return lambda *parts: CudaForward(KernelStep(*parts, room, product, capture))


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3"])
def test_steps_compute_what_torch_computes(root: Path, family: str) -> None:
    """Biases, norms of heads, a window shorter than the sequences, DoRA beside others."""
    model, size = base(family, root), 4 if family == "mistral" else 16
    want = World(model, page_size=size).run(JOBS)
    got = World(model, by_kernels(), page_size=size).run(JOBS)
    assert distance(got, want) < 1e-5


def test_steps_in_bfloat16_are_no_further_from_fp32_than_torch_s(root: Path) -> None:
    jobs = MANY if CARD else FEW[1:2]
    exact = World(base("small", root)).run(jobs)
    torch_s = World(base("small", root, dtype="bf16")).run(jobs)
    got = World(base("small", root, dtype="bf16"), by_kernels()).run(jobs)
    assert distance(got, exact) < 1.5 * distance(torch_s, exact)


def test_our_product_of_a_four_bit_base_gives_the_same_steps(root: Path) -> None:
    model = base("small", root, "nf4")
    want = World(model.dense()).run(FEW[1:2])
    product = Products(known_ways(model.device, model.dtype), "kernel, table")
    assert distance(World(model, by_kernels(product)).run(FEW[1:2]), want) < 1e-5


def test_our_product_of_a_base_in_groups_gives_the_same_steps(root: Path) -> None:
    """GPTQ with zeros and inputs out of order, the head too: no matrix is multiplied by torch."""
    write(directory("qwen2", root), root / "groups", GROUPS)
    model = load_base(BaseConfig(str(root / "groups"), dtype="fp32", device=DEVICE)).decoder
    assert isinstance(model.head, GroupWeight)
    want = World(model.dense()).run(FEW[1:2])
    ways = known_ways(model.device, model.dtype)
    product = Products({"only": ways["kernel, bits"]}, "only")
    assert distance(World(model, by_kernels(product)).run(FEW[1:2]), want) < 1e-5


def test_nobody_s_numbers_reach_another(root: Path) -> None:
    """Pages full of NaN, a slot of NaN, a row that is NaN itself; padding writes nowhere."""
    model = base("small", root)
    world = World(model, by_kernels(), fill=7.0)
    jobs = FEW[1:]
    want = world.run(jobs)
    assert bool((world.kv.k[:, :, 0] == 7).all())
    assert bool((world.kv.v[:, :, 3:] == 7).all())
    dirty = World(model, by_kernels(), fill=float("nan"), poison=6)
    assert all(map(torch.equal, dirty.run(jobs), want))  # to the bit, so two runs are alike too
    bad = job(4, {"c": 1.0}, [3], seed=50)
    dirty = World(model, by_kernels(), fill=float("nan"), poison=SLOT["c"])
    got = dirty.run([*jobs[:1], bad, *jobs[1:]])
    assert not got.pop(1).isfinite().any()
    assert distance(got, want) < 1e-5


def test_the_first_dora_adapter_needs_no_graph_of_its_own(root: Path) -> None:
    """Its scales are read by the graphs of before."""
    model = base("small", root)
    jobs = [job(4, {"d": 0.6, "a": 1.0}, [3], seed=2)]
    want = World(model).run(jobs)
    captures = FaultyCapture(RuntimeError(), lambda _: False)
    world = World(model, by_kernels(capture=captures))
    flags = list(world.slots.has_dora)
    world.slots.has_dora[:] = [False] * len(flags)
    without = world.run(jobs)
    asked = captures.asked
    world.slots.has_dora[:] = flags
    assert distance(world.run(jobs), want) < 1e-5
    assert distance(without, want) > 1e-3
    assert captures.asked == asked > 0


def test_steps_that_cannot_be_captured_are_answered(root: Path) -> None:
    """A card without memory for graphs computes what it would with them."""
    model = base("small", root)
    world = World(model, by_kernels(capture=FaultyCapture(torch.OutOfMemoryError("no memory"))))
    want = World(model).run(FEW[1:])
    assert distance(world.run(FEW[1:]), want) < 1e-5
    assert isinstance(world.forward, CudaForward)
    assert world.forward.eager == {Variant(1, 1)}


def running(number: int, params: SamplingParams, answered: int) -> Running:
    prompt = tuple(range(10 + number, 13 + number))
    request = Request(f"r{number}", prompt, params, Mixture(), "t", time.monotonic())
    sequence = Running(request, None)  # type: ignore[arg-type]  # no text comes of it
    for i in range(answered):
        sequence.append(30 + i)
    sequence.pages = [1 + number]
    return sequence


def test_tokens_are_those_of_the_sampler(root: Path) -> None:
    """Greedy and drawn rows here, filtered and penalised ones by the sampler on these logits."""
    world = World(base("small", root), by_kernels())
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
    model = base("small", root)

    def last(make: Callable[..., Forward] | None) -> torch.Tensor:
        world = World(model) if make is None else World(model, make)
        one, two = (running(i, SamplingParams(), 0) for i in range(2))
        with torch.inference_mode():
            for at in range(2):
                assert world.forward([Chunk(one, at, 1, False)], {}.__getitem__) is None
            both = [Chunk(two, 0, 1, False), Chunk(one, 2, 1, True)]
            logits = world.forward(both, {}.__getitem__)
        assert logits is not None
        return logits.values.cpu().clone()

    got, want = last(by_kernels()), last(None)
    assert got.shape == want.shape == (1, 320)
    assert distance([got], [want]) < 1e-5


def test_a_step_leaves_the_next_one_laid_out(root: Path) -> None:
    """Here the positions of the step that ran, on the host already those of the next."""
    world = World(base("small", root), by_kernels())
    forward = world.forward
    assert isinstance(forward, CudaForward)
    sequences = [running(i, SamplingParams(), 1) for i in range(2)]
    with torch.inference_mode():
        forward([Chunk(s, 0, 3, False) for s in sequences], {}.__getitem__)
        forward([Chunk(s, 3, 1, True) for s in sequences], {}.__getitem__)
    assert forward.step.decodes.device["positions"][:2].tolist() == [3, 3]
    host = forward.step.decodes.begin()
    assert host["positions"][:2].tolist() == [4, 4]
    assert host["places"][:2].tolist() == [s.pages[0] * 16 + 4 for s in sequences]


def test_compiling_ahead_leaves_no_trace(root: Path) -> None:
    """Prompts of padding run through every kernel, and no page is written."""
    model = base("small", root)
    world = World(model, by_kernels(), fill=7.0)
    assert isinstance(world.forward, CudaForward)
    world.forward.step.compile_prompts((3,))
    assert bool((world.kv.k == 7).all())
    assert bool((world.kv.v == 7).all())
    assert distance(world.run(FEW[1:2]), World(model).run(FEW[1:2])) < 1e-5


def test_preparing_leaves_no_trace(root: Path) -> None:
    """What a capture runs is padding, before the first step and after others."""
    capture = None if CARD else FaultyCapture(RuntimeError(), lambda _: False)
    world = World(base("small", root), by_kernels(max_batch=1, capture=capture), fill=7.0)
    forward = world.forward
    assert isinstance(forward, CudaForward)
    forward.prepare()
    assert bool((world.kv.k == 7).all())
    assert bool((world.kv.v == 7).all())
    world.run(FEW[:1])
    world.kv.k.fill_(7)
    forward.step.graphs._replays.clear()
    forward.prepare()
    assert bool((world.kv.k == 7).all())


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
        SamplingParams(3, ignore_eos=True),
        SamplingParams(3, temperature=0.9, seed=3, ignore_eos=True),
        SamplingParams(2, temperature=0.9, top_p=0.8, seed=3, ignore_eos=True),
    )

    def config(self, root: Path, kernels: Any) -> Config:
        return Config(
            BaseConfig(str(directory("small", root)), "main", "none", "fp32", DEVICE),
            EngineConfig(max_batch=4, kernels=kernels, kv_pages=40, step_tokens=8),
            AdaptersConfig(slots=4, max_rank=8),
        )

    def answers(self, root: Path, kernels: Any) -> list[list[int]]:
        config = self.config(root, kernels)
        with LocalEngine(config) as local:
            local.engine.warm_up()
            template = Template(local.base.shape, 4, PROJECTIONS)
            files = template.config, template.weights(1)
            local.add("one", read_upload(*files, None, local.base.shape, config.adapters))
            jobs = [
                ([5 + i, 6, 7], {"one": 2.0} if i else {}, s) for i, s in enumerate(self.SAMPLING)
            ]
            return local.generate(jobs)

    def test_answers_are_those_of_torch(self, root: Path) -> None:
        assert self.answers(root, "triton") == self.answers(root, "torch")

    def test_without_triton_it_is_said(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="not installed"):
            LocalEngine(self.config(root, "triton"))

    @pytest.mark.skipif(CARD, reason="there is a card")
    def test_without_a_card_it_is_said(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(ConfigError, match="need a card"):
            LocalEngine(self.config(root, "triton"))
