"""Steps that raise: who ends, who goes on with the same tokens, and what is left behind."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.core import Finish, Mixture, Request, SamplingParams
from mora_serve.engine import engine as engine_module
from mora_serve.engine import runner as runner_module
from mora_serve.engine.failures import is_memory
from mora_serve.engine.isolation import SMALL_STEPS, Isolation, _parts
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence
from mora_serve.engine.text import TextStream
from tests.engine.faults import FaultyForward, raises_for
from tests.engine.test_engine import GREEDY, PROMPT, check_nothing_held, drive, ids

DRAWN = dataclasses.replace(GREEDY, temperature=0.9, seed=11)
JOBS = [
    (PROMPT, {}, GREEDY),
    (PROMPT[3:], {"rank-8": 1.0}, DRAWN),
    (PROMPT * 3, {"rank-4": 0.5, "dora": 1.0}, GREEDY),
    (PROMPT[7:], {}, DRAWN),
    (PROMPT[1:], {"rslora": -0.5}, GREEDY),
    (PROMPT[:9], {"rank-8": 1.0}, DRAWN),
    (PROMPT[2:], {}, GREEDY),
]


def requests(local):
    return [local.request(job) for job in JOBS]


@pytest.fixture
def undisturbed(make_engine):
    """An engine, and what it answers without a fault."""
    local = make_engine(prefix_cache=False)
    return local, [ids(a) for a in drive(local, requests(local))]


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("when", ["before", "after"])
def test_only_those_that_a_step_raises_for_end(undisturbed, tokens, when):
    """The others' tokens are what they were, wherever in the step and in the answer it happens."""
    local, want = undisturbed
    asked = requests(local)
    culprits = {asked[i].id for i in (2, 5)}
    FaultyForward(local.engine, **{when: raises_for(*culprits, after=tokens)})
    answers = drive(local, asked)
    for request, answer, tokens_alone in zip(asked, answers, want, strict=True):
        if request.id in culprits:
            error = answer[-1].error
            assert (error.code, error.reason) == ("INTERNAL", "STEP_FAILED")
            assert request.id in error.message
            assert "secret" not in error.message
            assert len(ids(answer)) == tokens
        else:
            assert answer[-1].finish is Finish.LENGTH
            assert ids(answer) == tokens_alone
    assert local.engine.stats().failed_runs > 2
    check_nothing_held(local)


def test_what_a_failed_request_computed_is_found_by_nobody(make_engine):
    """Its pages leave the prefix cache, and are cleared before the next owner reads them."""
    local = make_engine(kv_pages=12)
    prompt = PROMPT * 4
    (want,) = drive(local, [local.request((prompt, {"rank-8": 1.0}, GREEDY))])
    local.engine.cache.reset()  # so that nobody finds the first one's pages
    request = local.request((prompt, {"rank-8": 1.0}, GREEDY))

    def spoil(batch):
        for chunk in batch:
            if chunk.sequence.request is request:
                local.engine.runner.kv.k[:, chunk.sequence.pages] = torch.nan
                local.engine.runner.kv.v[:, chunk.sequence.pages] = torch.nan
        raises_for(request.id)(batch)

    faulty = FaultyForward(local.engine, after=spoil)
    (failed,) = drive(local, [request])
    assert failed[-1].error.reason == "STEP_FAILED"
    faulty.after = lambda batch: None
    again = drive(local, [local.request((prompt, {"rank-8": 1.0}, GREEDY)) for _ in range(2)])
    assert again[0][-1].usage.cached_tokens == 0
    assert [ids(a) for a in again] == [ids(want)] * 2


def test_memory_that_does_not_suffice_for_all_together_ends_nobody(undisturbed):
    """The step is run in parts, and so are the next ones: nothing more raises."""
    local, want = undisturbed

    def limited(batch):
        if sum(c.length for c in batch) > 24:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    faulty = FaultyForward(local.engine, before=limited)
    assert [ids(a) for a in drive(local, requests(local))] == want
    raised = local.engine.stats().failed_runs
    assert raised
    first = len(faulty.sizes)
    assert [ids(a) for a in drive(local, requests(local))] == want
    assert local.engine.stats().failed_runs == raised
    assert max(faulty.sizes[first:]) <= 24
    check_nothing_held(local)


def test_memory_that_does_not_suffice_for_one_ends_that_one(undisturbed):
    """It is told so, and that a retry may do; the others run on, in steps as large as before."""
    local, want = undisturbed
    asked = requests(local)
    fault = raises_for(asked[1].id, after=2, error=MemoryError())
    faulty = FaultyForward(local.engine, before=fault)
    answers = drive(local, asked)
    error = answers[1][-1].error
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    others = [i for i in range(len(JOBS)) if i != 1]
    assert [ids(answers[i]) for i in others] == [want[i] for i in others]
    largest = max(faulty.sizes)
    faulty.sizes.clear()
    drive(local, requests(local))
    assert max(faulty.sizes) == largest


def test_what_the_sampler_raises_ends_its_request(undisturbed, monkeypatch):
    local, want = undisturbed
    sample = runner_module.sample

    def raising(logits, rows):
        if any(row.params.seed == 666 for row in rows):
            raise ZeroDivisionError
        return sample(logits, rows)

    monkeypatch.setattr(runner_module, "sample", raising)
    asked = requests(local)
    evil = local.request((PROMPT, {}, dataclasses.replace(DRAWN, seed=666)))
    *answers, failed = drive(local, [*asked, evil])
    assert failed[-1].error.reason == "STEP_FAILED"
    assert [ids(a) for a in answers] == want


def test_a_forward_that_serves_nobody_ends_the_engine(make_engine):
    """When one token of the base cannot be computed either, it is not the requests' fault."""
    local = make_engine()
    fault = lambda batch: 1 / 0  # noqa: E731
    FaultyForward(local.engine, before=fault)
    local.engine.submit(local.request((PROMPT, {}, GREEDY)))
    with pytest.raises(ZeroDivisionError):
        local.step()


def test_requests_that_all_raise_do_not_end_the_engine(make_engine):
    """A caller who finds what raises cannot take the server from the others with it."""
    local = make_engine()
    asked = [local.request((PROMPT, {"rank-8": 1.0}, GREEDY)) for _ in range(3)]
    FaultyForward(local.engine, before=raises_for(*(r.id for r in asked)))
    answers = drive(local, asked)
    assert [a[-1].error.reason for a in answers] == ["STEP_FAILED"] * 3
    (fine,) = drive(local, [local.request((PROMPT, {}, GREEDY))])
    assert fine[-1].finish is Finish.LENGTH
    check_nothing_held(local)


@pytest.mark.parametrize("method", ["push", "flush"])
def test_tokens_that_cannot_be_decoded_end_their_request(undisturbed, monkeypatch, method):
    """What the tokenizer raises is one request's fault, in its middle or at its end."""
    local, want = undisturbed

    class Broken(TextStream):
        def __init__(self, decode, stop=()):
            super().__init__(decode, stop)
            if stop == ("culprit",):
                setattr(self, method, lambda *args: 1 / 0)

    monkeypatch.setattr(engine_module, "TextStream", Broken)
    evil = local.request((PROMPT, {}, dataclasses.replace(GREEDY, stop=("culprit",))))
    asked = requests(local)
    failed, *answers = drive(local, [evil, *asked])
    error = failed[-1].error
    assert (failed[-1].finish, error.code, error.reason) == (
        *(Finish.ERROR, "INTERNAL", "TEXT_FAILED"),
    )
    assert evil.id in error.message
    assert [ids(a) for a in answers] == want
    check_nothing_held(local)


def test_a_request_whose_text_is_broken_can_be_aborted(make_engine, monkeypatch):
    local = make_engine()
    monkeypatch.setattr(TextStream, "flush", lambda self: 1 / 0)
    request = local.request((PROMPT, {}, SamplingParams(200, ignore_eos=True)))
    local.engine.submit(request)
    local.step()
    local.engine.abort(request.id)
    while not (events := local.step()):
        pass
    assert events[-1].finish is Finish.ERROR
    check_nothing_held(local)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_is_told_from_other_faults(error, memory):
    assert is_memory(error) is memory


def chunk(length: int, name: str = "r", start: int = 0) -> Chunk:
    request = Request(name, tuple(range(1, start + length + 1)), GREEDY, Mixture())
    return Chunk(Sequence(request, TextStream(lambda ids: "")), start, length, True)


class TestParts:
    @given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 40))
    def test_parts_are_the_batch_in_order(self, lengths, most):
        """No part is too large or empty, and none has two pieces of one request."""
        batch = [chunk(n) for n in lengths]
        parts = list(_parts(batch, most))
        pieces = [c for part in parts for c in part]
        for whole in batch:
            own = [c for c in pieces if c.sequence is whole.sequence]
            assert [own[0].start, *(c.start + c.length for c in own)] == [
                whole.start,
                *(c.start for c in own[1:]),
                whole.start + whole.length,
            ]
            assert [c.samples for c in own] == [False] * (len(own) - 1) + [True]
        for part in parts:
            assert part
            assert len({c.sequence for c in part}) == len(part)
            assert not most or sum(c.length for c in part) <= most

    def test_parts_grow_again_when_memory_has_sufficed_for_a_while(self):
        """Twice as large each time, up to whole steps."""
        sizes, limit = [], 30

        def run(part):
            sizes.append(sum(c.length for c in part))
            if sizes[-1] > limit:
                raise MemoryError
            return []

        isolation = Isolation(run)
        batch = [chunk(10) for _ in range(8)]
        assert not isolation.run(batch).failed
        limit = 1000
        seen = set()
        for _ in range(4 * SMALL_STEPS):
            sizes.clear()
            assert not isolation.run(batch).raised
            seen.add(max(sizes))
        assert seen == {20, 40, 80}

    def test_a_chunk_that_is_too_large_alone_is_cut(self):
        """And after a piece that fails, the rest of its request is not run."""
        done = []

        def run(part):
            if sum(c.length for c in part) > 25:
                raise MemoryError
            if part[0].start == 50:
                raise ZeroDivisionError
            done.extend((c.start, c.length) for c in part)
            return []

        outcome = Isolation(run).run([chunk(100, "long")])
        assert done == [(0, 25), (25, 25)]
        assert [e.reason for e in outcome.failed.values()] == ["STEP_FAILED"]
