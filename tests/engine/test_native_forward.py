"""Whole steps of the native path: against torch's, and to the bit whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.config import BaseConfig, EngineConfig
from mora_serve.engine import native_forward
from mora_serve.engine.forward import Forward
from mora_serve.engine.native_forward import NativeForward
from mora_serve.engine.torch_forward import TorchForward
from mora_serve.errors import ConfigError
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from mora_serve.model.native.library import PHASES, ModelStruct, StepStruct, targets
from tests.engine.steps import (
    ADAPTERS,
    CONTEXT,
    JOBS,
    MIXTURES,
    SLOT,
    World,
    decoder,
    directory,
    distance,
    job,
    reference,
)

pytestmark = pytest.mark.skipif(
    not targets(torch.float32), reason="no compiler built the native path"
)
# two from files in 16 bits, whose weights are tiled: one with a tied head, one without; the last
# in groups of whole numbers, the head too, with inputs that go into groups by act-order
FAMILIES = ("llama3", "mistral", "qwen2", "qwen3", "llama3-16", "qwen2-16", "qwen2-groups")
FLOAT_TARGETS = targets(torch.float32)
BF16_TARGETS = targets(torch.bfloat16)
ALL_TARGETS = [("fp32", t) for t in FLOAT_TARGETS] + [("bf16", t) for t in BF16_TARGETS]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


def native(
    decoder: Decoder,
    target: str,
    *,
    threads: int = 2,
    page_size: int = 16,
    fill: float = 0.0,
    poison: int | None = None,
) -> World:
    """A world of the native path."""
    return World(
        decoder,
        lambda *parts: NativeForward(*parts, CONTEXT, threads, target),
        page_size=page_size,
        fill=fill,
        poison=poison,
    )


@pytest.mark.parametrize("target", FLOAT_TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("page_size", [4, 16])
def test_steps_compute_what_torch_computes(
    root: Path, family: str, target: str, page_size: int
) -> None:
    """Biases, norms of heads, a window shorter than the sequences, DoRA beside others."""
    want = World(reference(family, root, "none", "fp32"), page_size=page_size).run(JOBS)
    got = native(decoder(family, root), target, page_size=page_size).run(JOBS)
    assert distance(got, want) < 3e-6


@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_steps_on_a_four_bit_base(root: Path, target: str) -> None:
    """Against torch's products with the dequantised weights."""
    want = World(reference("llama3", root, "nf4", "fp32").dense()).run(JOBS)
    got = native(decoder("llama3", root, "nf4"), target).run(JOBS)
    assert distance(got, want) < 3e-6


@pytest.mark.parametrize("target", BF16_TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_bfloat16(root: Path, family: str, target: str) -> None:
    """No further from fp32 than torch's bfloat16 is, and a little."""
    exact = World(reference(family, root, "none", "fp32")).run(JOBS)
    torch_s = World(reference(family, root, "none", "bf16")).run(JOBS)
    got = native(decoder(family, root, dtype="bf16"), target).run(JOBS)
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
    (want,) = native(decoder(family, root, dtype=dtype), target, threads=1, page_size=16).run(
        [alone]
    )
    world = native(decoder(family, root, dtype=dtype), target, threads=threads, page_size=page_size)
    got = world.run([*others[:place], chunked, *others[place:]])[place]
    ends = torch.tensor(chunked.chunks).cumsum(0) - 1
    assert torch.equal(got, want[ends])


@pytest.mark.parametrize(("dtype", "target"), ALL_TARGETS)
def test_nobody_s_numbers_reach_another(root: Path, dtype: str, target: str) -> None:
    """Pages full of NaN, a slot of NaN, and a row that is NaN itself."""
    want = native(decoder("llama3", root, dtype=dtype), target).run(JOBS)
    world = native(decoder("llama3", root, dtype=dtype), target, fill=float("nan"), poison=6)
    assert all(torch.equal(g, w) for g, w in zip(world.run(JOBS), want, strict=True))
    for i in (0, len(JOBS)):
        world = native(
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
    world = native(decoder("llama3", root), FLOAT_TARGETS[0])
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
    native(tiled, FLOAT_TARGETS[0])
    assert (tiled.embedding is tiled.head) == (family == "llama3-16")
    tokens, hidden = torch.tensor([0, 332, 17, 17]), torch.randn(3, plain.shape.hidden_size)
    assert torch.equal(
        tiled.embedding.rows(tokens, torch.float32), plain.embedding.rows(tokens, torch.float32)
    )
    assert torch.allclose(tiled.logits(hidden), plain.logits(hidden), atol=1e-5)
    assert tiled.embedding.nbytes == 336 * 128 * 2


def test_steps_of_many_rows_and_of_many_adapters_alternate(root: Path) -> None:
    """A workspace that grew for the one has room for the other; the numbers stay."""
    world = native(decoder("qwen3", root), FLOAT_TARGETS[0])
    long = [job(120, {}, [120], seed=9)]
    many = [job(6, MIXTURES[5], [6], seed=i) for i in range(20)]
    first = world.run(long), world.run(many)
    for _ in range(2):
        for jobs, want in zip((long, many), first, strict=True):
            assert all(map(torch.equal, world.run(jobs), want))


def test_dora_scales_that_come_later_are_used(root: Path) -> None:
    """A load after the first steps writes where these looked already."""
    want = native(decoder("llama3", root), FLOAT_TARGETS[0]).run(JOBS)
    world = native(decoder("llama3", root), FLOAT_TARGETS[0])
    world.slots.has_dora[:] = [False] * world.slots.slots
    without = world.run(JOBS)
    for name, (_, scaled) in ADAPTERS.items():
        world.slots.has_dora[SLOT[name]] = scaled
    assert all(map(torch.equal, world.run(JOBS), want))
    assert not all(map(torch.equal, without, want))


def test_time_is_told_by_phase(root: Path) -> None:
    """Every phase takes some."""
    import numpy as np

    world = native(decoder("llama3", root), FLOAT_TARGETS[0])
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
