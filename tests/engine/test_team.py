"""Two ranks, the second a process of its own: the same answers, and what happens when one fails."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from benchmarks import oracle
from benchmarks.exactness import Capture
from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import Event, SamplingParams
from mora_serve.engine import orders
from mora_serve.engine.cuda_forward import CudaForward
from mora_serve.engine.failures import DeviceLost
from mora_serve.errors import ConfigError
from tests.engine.faults import FaultyForward

GREEDY = SamplingParams(12, ignore_eos=True)
DRAWN = SamplingParams(12, ignore_eos=True, temperature=0.9, seed=11)
PROMPT = list(range(20, 60))
MIXTURES = (
    {},
    {"rank-8": 1.0},
    {"dora": 1.0},
    {"dora": 0.5, "rank-4": -0.7, "dora-2": 0.4},
    {"patterns": 0.8, "rslora": 0.5, "one-layer": 1.0},
    {"feed-forward": 1.0, "attention": -1.0},
)
JOBS = [(PROMPT[i:], m, DRAWN if i % 2 else GREEDY) for i, m in enumerate(MIXTURES)]
TEXTS = [[5, 6, 7], [8] * 30, []]


def make(root, ranks, kernels="torch", **adapters):
    local = LocalEngine(
        Config(
            BaseConfig(str(root / "base"), quantization="none", dtype="fp32", device="cpu"),
            EngineConfig(
                kernels=kernels,
                threads=1,
                tensor_parallel=ranks,
                step_tokens=64,
                prefix_cache=False,
            ),
            # Fewer slots than adapters, fewer bytes than they take: loads are evicted and repeated.
            AdaptersConfig(**{"slots": 8, "host_bytes": 500_000, **adapters}),
        )
    )
    for name in oracle.VARIANTS:
        local.register(name, root / "adapters", name)
    return local


@pytest.fixture(scope="module")
def both(model_root):
    """An engine of one rank, and one of two."""
    with make(model_root, 1) as one, make(model_root, 2) as two:
        yield one, two


def ranks_of(local):
    return [w.process for w in local.team._workers]


def drive(local, requests):
    """Step until all have ended; the events of each."""
    for request in requests:
        local.engine.submit(request)
    events = {r.id: [] for r in requests}
    while any(not e or e[-1].finish is None for e in events.values()):
        for event in local.step():
            if isinstance(event, Event):
                events[event.request_id].append(event)
    return [events[r.id] for r in requests]


def tokens(events):
    return [t.id for e in events for t in e.tokens]


def test_two_ranks_give_the_answers_of_one(both):
    """Every kind of adapter, mixtures, DoRA beside others; the logits up to rounding."""
    found, start = [], 1
    for local in both:
        capture = Capture(local)
        start = local._count + 1
        answers = local.generate(JOBS)
        rows = [torch.stack(capture.logits[f"r{start + i}"]) for i in range(len(JOBS))]
        local.engine.runner.forward = local.engine.runner.forward._forward
        del local.engine.runner.run  # the one that captures
        found.append((answers, rows))
    (want, reference), (got, rows) = found
    assert got == want
    for row, other in zip(rows, reference, strict=True):
        torch.testing.assert_close(row, other, rtol=1e-4, atol=1e-3)


def test_ranks_that_run_by_kernels_give_them_too(both, model_root):
    """Prompts beside single tokens, as rank 0 lays them out; in the interpreter, without graphs."""
    jobs = [(PROMPT[:3], m, SamplingParams(2, ignore_eos=True)) for m in (MIXTURES[1], MIXTURES[3])]
    want = both[0].generate(jobs)
    with make(model_root, 2, kernels="triton") as local:
        assert isinstance(local.engine.runner.forward, CudaForward)
        local.engine.runner.prepare()
        assert local.generate(jobs) == want


def test_adapters_that_come_and_go_are_the_same_on_every_rank(both):
    """All variants in turn through few slots: loads, evictions, scales made once."""
    jobs = [(PROMPT[:9], {name: 1.0}, GREEDY) for name in oracle.VARIANTS]
    want = [both[0].generate([job])[0] for job in jobs]
    assert [both[1].generate([job])[0] for job in jobs] == want
    assert [both[1].generate([job])[0] for job in reversed(jobs)] == want[::-1]
    assert both[1].engine.pool.evictions > 0


def test_pooled_states_are_the_same(both):
    states = []
    for local in both:
        future = local.engine.pooled_hidden(["abc", "", "the hidden state of a text"], 1, 64)
        states.append(future.result(60))
    np.testing.assert_allclose(*states, rtol=1e-5, atol=1e-5)


def test_a_step_that_raises_on_every_rank_ends_its_request_alone(both):
    """The others' tokens are what they were."""
    local = both[1]
    want = [tokens(e) for e in drive(local, [local.request(j) for j in JOBS])]
    asked = [local.request(job) for job in JOBS]
    culprit = asked[2].id

    def spoil(batch):
        for chunk in batch:
            if chunk.sequence.request.id == culprit and chunk.sequence.output:
                chunk.sequence.tokens[-1] = 10**6  # a token that no rank's embedding has

    faulty = FaultyForward(local.engine, before=spoil)
    try:
        answers = drive(local, asked)
    finally:
        local.engine.runner.forward = faulty._forward
    for request, events, alone in zip(asked, answers, want, strict=True):
        if request.id == culprit:
            assert events[-1].error.reason == "STEP_FAILED"
        else:
            assert tokens(events) == alone
    assert local.engine.isolation.raised > 0
    assert [tokens(e) for e in drive(local, [local.request(j) for j in JOBS])] == want


@pytest.mark.parametrize("rank", [0, 1])
def test_an_adapter_that_one_rank_cannot_load_fails_alone(both, rank, monkeypatch):
    """Its request is told; the ranks still agree on what the next ones load."""
    local = both[1]
    want = local.generate([(PROMPT, {"dora": 1.0}, GREEDY)])
    for name in list(oracle.VARIANTS)[:8]:  # out of the slots and off the host
        local.generate([(PROMPT[:5], {name: 1.0}, GREEDY)])

    local.engine.pool._host.forget(local.digests["dora"])

    def fail(digest, adapter, total):
        raise MemoryError

    tell = local.team.followers._tell

    def tell_of_no_layer(order):
        if isinstance(order, orders.Convert):
            modules = tuple(dataclasses.replace(m, layer=99) for m in order.modules)
            order = dataclasses.replace(order, modules=modules)
        tell(order)

    with monkeypatch.context() as patch:
        if rank == 0:
            patch.setattr(local.engine.pool._host._converter, "convert", fail)
        else:
            patch.setattr(local.team.followers, "_tell", tell_of_no_layer)
        (events,) = drive(local, [local.request((PROMPT, {"dora": 1.0}, GREEDY))])
    assert events[-1].error.reason == "LOAD_FAILED"
    assert local.generate([(PROMPT, {"dora": 1.0}, GREEDY)]) == want


def fails(local, happen):
    """Run the engine's thread, have something ``happen``; the errors of requests under way."""
    ended, events, failed = threading.Event(), [], threading.Event()

    def deliver(batch):
        events.extend(e for e in batch if isinstance(e, Event))
        if any(e.finish for e in events):
            ended.set()

    local.engine.start(deliver, failed.set)
    long = SamplingParams(200, ignore_eos=True)
    request = local.request((PROMPT, {}, long))
    local.engine.submit(request)
    deadline = time.monotonic() + 60
    while not events and time.monotonic() < deadline:
        time.sleep(0.01)
    happen()
    assert failed.wait(60)
    assert ended.wait(60)
    return events


def gone(local):
    """Whether every worker has ended."""
    for process in ranks_of(local):
        process.wait(30)
    return all(process.poll() is not None for process in ranks_of(local))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_raises_on_one_rank_alone_ends_the_engine(model_root, rank):
    """Requests are told at once; nothing waits for a rank that does not come."""
    with make(model_root, 2) as local:
        team = local.team
        team.settle_seconds = 1.0

        def happen():
            if rank == 0:
                local.base.decoder.layers[1].sites["down"].parts = ()
            else:
                tell = team.tell
                team.tell = lambda order: tell(spoiled(order))

        events = fails(local, happen)
        assert events[-1].error.code == "UNAVAILABLE"
        assert events[-1].error.reason == "ENGINE_FAILED"
        with pytest.raises(DeviceLost):
            team.pool_states(local.base.decoder, TEXTS, 1)
        team.tell = lambda order: None  # as if it had been told before a rank was lost
        with pytest.raises(DeviceLost), team.together(orders.Clear(())):
            pass  # what is computed without that rank is no result
        assert gone(local)
    assert not team._folder.exists()


def spoiled(order):
    """The same step, of a token that no rank's embedding has."""
    if not isinstance(order, orders.Step):
        return order
    tokens = order.inputs.tokens + 10**6
    return orders.Step(dataclasses.replace(order.inputs, tokens=tokens))


def test_a_worker_that_cannot_start_is_an_error_in_one_line(model_root, monkeypatch):
    """Not a process that waits for it."""
    monkeypatch.setattr("mora_serve.engine.worker_process.WORKER", "mora_serve.no_such_worker")
    with pytest.raises(DeviceLost, match="the process of rank 1 has ended with status 1") as caught:
        make(model_root, 2)
    assert "\n" not in str(caught.value)


def test_a_worker_without_its_device_is_an_error_in_one_line(model_root, monkeypatch):
    """Rank 0, which waits for it to join, is told."""
    devices = lambda name, rank, ranks: torch.device("cuda:7" if rank else "cpu")  # noqa: E731
    monkeypatch.setattr("mora_serve.engine.team.rank_device", devices)
    with pytest.raises(ConfigError, match="rank 1 cannot start") as caught:
        make(model_root, 2)
    assert caught.value.field == "engine.tensor_parallel"
    assert "\n" not in str(caught.value)
