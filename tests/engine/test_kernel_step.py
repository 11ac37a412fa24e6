"""A step's kernels on a rank that follows what rank 0 has laid out, and where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import families
from mora_serve.config import BaseConfig
from mora_serve.engine import orders
from mora_serve.engine.cuda_forward import CudaForward
from mora_serve.engine.graphs import Variant
from mora_serve.engine.kernel_step import KernelStep, LaidOut, Room
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from tests.engine.faults import FaultyCapture
from tests.engine.steps import CONTEXT, World, distance, job

JOBS = (
    job(3, {"d": 0.6, "e": 0.4}, [2], seed=1),
    job(5, {"a": 0.5, "b": 0.8}, [1, 3], seed=2),
)


class Followed:
    """A team of one follower, in this process, that has the whole base."""

    def __init__(self) -> None:
        self.step: KernelStep | None = None
        self.pages: list[int] = []

    @contextmanager
    def together(self, order: object) -> Iterator[None]:
        assert self.step is not None
        if isinstance(order, orders.Prepare):
            self.step.prepare()
        elif isinstance(order, orders.Step):
            assert isinstance(order.inputs, LaidOut)
            self.pages.append(order.inputs.pages)
            self.step.follow(order.inputs)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    path = tmp_path_factory.mktemp("follow")
    families.make_base("llama3", path, num_hidden_layers=1)
    return load_base(BaseConfig(str(path), "main", "none", "fp32", "cpu")).decoder


def world(model: Decoder, team: Any = None, capture: Any = None, **more: Any) -> World:
    room = Room(CONTEXT, 2, 4)
    return World(
        model, lambda *parts: CudaForward(KernelStep(*parts, room, None, capture), team), **more
    )


def step_of(world: World) -> KernelStep:
    assert isinstance(world.forward, CudaForward)
    return world.forward.step


def test_a_follower_computes_what_rank_0_does(model: Decoder) -> None:
    """Prompts, a token beside one, single tokens; also where rank 0 alone has made more room."""
    team = Followed()
    first, other = world(model, team), world(model)
    team.step = step_of(other)
    step_of(first).make_room(40)  # as a step does that raises before it is told
    assert distance(first.run(JOBS), World(model).run(JOBS)) < 1e-5
    assert torch.equal(step_of(first).logits, step_of(other).logits)
    assert torch.equal(step_of(first).tokens, step_of(other).tokens)
    assert torch.equal(first.kv.k, other.kv.k)
    assert set(team.pages) == {1}  # of the eight of a whole context


def test_room_that_there_is_no_memory_for_is_not_half_made(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shorter prompts find what they had, and the next long one asks for all of it."""
    step = step_of(world(model))
    step.make_room(8)

    def no_memory(rows: int) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(step, "_make_adapters", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            step.make_room(20)
    assert step.prompts.tokens == step.prompt_adapters.buffers.max_rows == 8
    assert step.make_room(20).tokens == step.prompt_adapters.buffers.max_rows == 32


def test_preparing_again_on_a_follower_writes_to_no_page(model: Decoder) -> None:
    """Its rows are those of the last step that it was told of, until it makes them padding."""
    team = Followed()
    first = world(model, team)
    other = world(model, capture=FaultyCapture(RuntimeError(), lambda _: False))
    team.step = step = step_of(other)
    first.run(JOBS[:1])
    assert int(step.decodes.begin()["places"][0]) >= 0
    other.kv.k.fill_(7)
    step.buckets, step.graphs._replays = [1], {}
    step.prepare()
    assert Variant(1, 1) in step.graphs._replays
    assert bool((other.kv.k == 7).all())
