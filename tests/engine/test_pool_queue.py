"""Passes over texts in line: small, fair, and the same states as without company."""

from __future__ import annotations

import itertools
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import families
from mora_serve.config import BaseConfig, EngineConfig
from mora_serve.engine import pool_queue
from mora_serve.engine.pool_queue import PoolJob, PoolLine, PoolQueue
from mora_serve.errors import Internal, Unavailable
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from mora_serve.model.pooling import pool_states

LIMITS = EngineConfig(max_batch=8, step_tokens=64)  # a request's share: 32 tokens at depth 2 of 4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Decoder:
    path = tmp_path_factory.mktemp("pool_queue")
    families.make_base("llama3", path, num_hidden_layers=4)
    return load_base(BaseConfig(str(path), "main", "none", "fp32", "cpu")).decoder


@pytest.fixture
def queue(decoder) -> PoolQueue:
    return PoolQueue(decoder, LIMITS)


def job(*lengths: int, depth: int = 2, background: bool = False, tenant: str = "") -> PoolJob:
    """Texts of these lengths, each of another token."""
    return PoolJob([[5 + i] * n for i, n in enumerate(lengths)], depth, background, tenant)


def alone(decoder: Decoder, made: PoolJob) -> list[bytes]:
    return [pool_states(decoder, [text], made.depth)[0].tobytes() for text in made.texts]


jobs = st.builds(
    job,
    st.integers(1, 50),
    st.integers(0, 50),
    depth=st.integers(0, 4),
    background=st.booleans(),
    tenant=st.sampled_from("abc"),
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(jobs, max_size=6), st.booleans())
def test_every_text_gets_the_state_that_it_has_alone(decoder, made, busy) -> None:
    queue = PoolQueue(decoder, LIMITS)
    for one in made:
        queue.add(one)
    while queue:
        queue.run(busy)
    for one in made:
        states = one.done.result(0)
        assert [s.tobytes() for s in states] == alone(decoder, one)


def test_a_pass_has_a_share_of_the_step_in_tokens_by_depth(queue) -> None:
    """A token after half of the layers is half of one; keys give way while requests run."""
    for depth, background, busy, tokens in (
        *((2, False, True, 32), (4, False, True, 16), (1, False, True, 64)),
        *((2, True, True, 8), (2, True, False, 32), (0, False, True, 64)),
    ):
        queue.add(job(*[4] * 30, depth=depth, background=background))
        before = queue.tokens
        cost = queue.run(busy)
        assert queue.tokens - before == tokens
        assert cost == -(-tokens * depth // 4)
        queue.fail(Unavailable("over"))


def test_a_text_beyond_the_share_is_taken_alone(queue) -> None:
    made = [job(3), job(200), job(3)]
    for one in made:
        queue.add(one)
    seen = []
    while queue:
        queue.run(True)
        seen.append([one.done.done() for one in made])
    assert seen == [[True, False, False], [True, True, False], [True, True, True]]


def test_jobs_take_turns(queue) -> None:
    """One of a single text passes one of a hundred."""
    for background in (False, True):
        many, one = job(*[4] * 100, background=background), job(4, background=background)
        queue.add(many)
        queue.add(one)
        queue.run(True)
        assert one.done.done()
        assert not many.done.done()


def test_a_tenant_with_one_prompt_waits_for_one_of_each_others(queue) -> None:
    """However many a neighbour has in line, and though a pass has room for eight of them."""
    flood = [job(4, tenant="flood") for _ in range(100)]
    quiet = [job(4, tenant=name) for name in ("one", "two")]
    for one in (*flood, *quiet):
        queue.add(one)
    queue.run(True)
    assert all(one.done.done() for one in quiet)
    assert [one.done.done() for one in flood] == [True] * 6 + [False] * 94  # in their order


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=25),
    st.sets(st.integers(0, 24), max_size=5),
)
def test_between_two_prompts_of_a_tenant_each_other_waiting_one_has_one(
    decoder, monkeypatch, made, left
) -> None:
    """Each tenant's own in order; also where a pass ends before a prompt that does not fit."""
    queue, order = PoolQueue(decoder, LIMITS), []
    jobs = [job(length, tenant=tenant) for tenant, length in made]

    def seen(_: Decoder, texts: list[list[int]], depth: int) -> np.ndarray:
        return np.zeros((len(texts), 4), np.float32)

    monkeypatch.setattr(pool_queue, "pool_states", seen)
    for i, one in enumerate(jobs):
        queue.add(one)
        one.done.add_done_callback(lambda future, i=i: future.cancelled() or order.append(i))
        if i in left:
            one.done.cancel()
    while queue:
        queue.run(True)
    assert sorted(order) == [i for i in range(len(jobs)) if i not in left]
    for tenant in {jobs[i].tenant for i in order}:
        own = [at for at, i in enumerate(order) if jobs[i].tenant == tenant]
        assert [order[at] for at in own] == sorted(order[at] for at in own)
        for start, end in itertools.pairwise(own):
            between = {jobs[i].tenant for i in order[start + 1 : end]}
            assert {jobs[i].tenant for i in order[end + 1 :]} - {tenant} <= between


def test_what_requests_wait_for_and_what_they_do_not_both_progress(queue) -> None:
    keys = job(4, 4, background=True)
    queue.add(keys)
    for _ in range(2):
        queue.add(job(*[4] * 20))
    queue.run(True)
    assert keys.done.done()
    assert queue.urgent == len(queue) == 2


def test_keys_take_a_quarter_of_the_time_at_most_while_requests_run(queue, monkeypatch) -> None:
    clock = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)

    def slow(*args) -> np.ndarray:
        nonlocal clock
        clock += 1.0
        return pool_states(*args)

    monkeypatch.setattr(pool_queue, "pool_states", slow)
    queue.add(job(*[4] * 100, background=True))

    def passes(busy: bool) -> bool:
        before = queue.tokens
        queue.run(busy)
        return queue.tokens > before

    seen = [passes(True)]
    for _ in range(8):
        clock += 0.75
        seen.append(passes(True))
    assert seen == [True, False, False, False, True, False, False, False, True]
    assert passes(False)
    assert not passes(True)
    queue.add(job(4))
    assert passes(True)


def test_jobs_of_another_depth_have_their_own_pass(queue, decoder) -> None:
    made = [job(4, 4, depth=1), job(4, depth=3), job(4, depth=1)]
    for one in made:
        queue.add(one)
    queue.run(True)
    assert [one.done.done() for one in made] == [True, False, True]
    queue.run(True)
    assert [s.tobytes() for s in made[1].done.result(0)] == alone(decoder, made[1])


def test_nothing_is_computed_for_whoever_has_left(queue) -> None:
    gone, here = job(4), job(5)
    queue.add(gone)
    queue.add(here)
    assert gone.done.cancel()
    queue.run(True)
    assert here.done.done()
    assert queue.tokens == 5


def test_a_fault_ends_the_jobs_of_its_pass_and_no_other(queue) -> None:
    bad, late = PoolJob([[5], [999], [5]], 2), job(4)
    queue.add(bad)
    queue.run(True)
    with pytest.raises(Internal):
        bad.done.result(0)
    assert not queue
    queue.add(late)
    queue.run(True)
    assert np.isfinite(late.done.result(0)).all()


def test_all_in_line_can_be_ended(queue) -> None:
    begun, waiting, gone = job(*[4] * 20), job(4, depth=1), job(4, background=True)
    for one in (begun, waiting, gone):
        queue.add(one)
    gone.done.cancel()
    queue.run(True)
    queue.fail(Unavailable("the server is shutting down"))
    assert not queue
    for one in (begun, waiting):
        with pytest.raises(Unavailable):
            one.done.result(0)


def test_a_line_can_be_counted_while_it_changes() -> None:
    """Threads that submit ask how long it is, at any moment."""
    line, over, wrong = PoolLine(), threading.Event(), []

    def count() -> None:
        while not over.is_set():
            try:
                len(line)
            except RuntimeError as e:
                wrong.append(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=count)
    thread.start()
    try:
        for i in range(20_000):
            line.append(PoolJob([], 1, tenant=f"t{i % 7}"))
            if i % 3:
                line.popleft()
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert not wrong
    left = len(line)
    assert left == 20_000 - sum(1 for i in range(20_000) if i % 3)
    line.discard(PoolJob([], 1, tenant="t0"))
    assert len(line) == left
