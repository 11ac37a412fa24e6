"""The scheduler's promises, on random loads with tiny caches and few slots."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mora_serve.config import EngineConfig
from mora_serve.core import AdapterWeight, Mixture, Request, SamplingParams
from mora_serve.engine.fairness import FairQueue
from mora_serve.engine.kv_cache import IntegrityError, KVCache
from mora_serve.engine.scheduler import Batch, Scheduler
from mora_serve.engine.sequence import Sequence
from mora_serve.engine.text import TextStream

DIGESTS = [f"{i:064x}" for i in range(8)]


class Slots:
    """Device slots with reference counts, LRU, and loads that take some steps."""

    def __init__(self, slots: int, delay: int = 0) -> None:
        self.slots = slots
        self.delay = delay
        self.refs: dict[str, int] = {}  # in a slot -> references, least recently used first
        self.ready_in: dict[str, int] = {}

    def hold(self, digests: tuple[str, ...]) -> bool:
        for digest in digests:
            if digest not in self.refs:
                self._load(digest, digests)
        if not all(d in self.refs and not self.ready_in.get(d) for d in digests):
            return False
        for digest in digests:
            self.refs[digest] = self.refs.pop(digest) + 1
        return True

    def assigned(self, digests: tuple[str, ...]) -> bool:
        return all(d in self.refs for d in digests)

    @property
    def can_prefetch(self) -> bool:
        return len(self.ready_in) < 2

    def prefetch(self, line: list[tuple[str, ...]]) -> bool:
        wanted = tuple(d for digests in line for d in digests)
        for digest in wanted:
            if digest not in self.refs:
                if not self.can_prefetch:
                    return False
                self._load(digest, wanted)
                if digest not in self.refs:
                    break
        return True

    def drop(self, digests: tuple[str, ...]) -> None:
        for digest in digests:
            assert self.refs[digest] > 0
            self.refs[digest] -= 1

    def tick(self) -> None:
        self.ready_in = {d: n - 1 for d, n in self.ready_in.items() if n > 1}

    def _load(self, digest: str, wanted: tuple[str, ...]) -> None:
        if len(self.refs) == self.slots:
            idle = (d for d, n in self.refs.items() if not n and d not in wanted)
            victim = next((d for d in idle if not self.ready_in.get(d)), None)
            if victim is None:
                return
            del self.refs[victim]
        self.refs[digest] = 0
        if self.delay:
            self.ready_in[digest] = self.delay


def seconds(batch: Batch) -> float:
    """What a step takes here: a fixed part, and little a token."""
    return 0.01 + 0.0001 * sum(c.length for c in batch)


class Engine:
    """Steps the real scheduler; the model is left out: the next token is a hash of the last."""

    def __init__(
        self,
        pages: int = 9,
        page_size: int = 4,
        max_batch: int = 4,
        step_tokens: int = 8,
        slots: int = 4,
        delay: int = 0,
        prefix_cache: bool = True,
        pace: float = 0.0,
    ) -> None:
        limits = EngineConfig(
            max_batch=max_batch, step_tokens=step_tokens, page_size=page_size, step_pace=pace
        )
        self.limits = limits
        self.cache = KVCache(pages, page_size, prefix_cache)
        self.slots = Slots(slots, delay)
        self.scheduler = Scheduler(limits, self.cache, self.slots)
        self.done: list[str] = []
        self.steps = 0
        self.owner: dict[int, tuple[object, ...]] = {}  # page -> what its contents depend on

    def add(
        self,
        name: str,
        prompt: tuple[int, ...] = (1, 2, 3),
        max_tokens: int = 4,
        digests: tuple[str, ...] = (),
        tenant: str = "t",
    ) -> Sequence:
        mixture = Mixture(tuple(AdapterWeight(d, 1.0, d) for d in digests))
        sampling = SamplingParams(max_tokens=max_tokens)
        sequence = Sequence(Request(name, prompt, sampling, mixture, tenant), TextStream(str))
        assert self.scheduler.fits(len(prompt), max_tokens)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Batch:
        self.cache.take_new()
        self.slots.tick()
        batch = self.scheduler.schedule(float(self.steps))
        self.steps += 1
        self.check(batch)
        for chunk in batch:
            self.write(chunk.sequence, chunk.start, chunk.length)
        self.scheduler.measured(batch, seconds(batch))
        self.scheduler.advance(batch)
        for chunk in batch:
            sequence = chunk.sequence
            if chunk.samples:
                sequence.append(hash((sequence.tokens[-1], len(sequence.tokens))) % 50)
                if sequence.remaining == 0:
                    self.scheduler.remove(sequence)
                    self.done.append(sequence.request.id)
        self.scheduler.check_integrity()
        return batch

    def check(self, batch: Batch) -> None:
        assert sum(c.length for c in batch) <= self.limits.step_tokens
        assert len(self.scheduler.running) <= self.limits.max_batch
        assert len({id(c.sequence) for c in batch}) == len(batch)
        lengths = [c.length for c in batch]
        assert min(lengths, default=1) >= 1
        assert [n > 1 for n in lengths] == sorted(n > 1 for n in lengths)
        for c in batch:
            assert c.start == c.sequence.computed
            assert c.samples == (c.start + c.length == len(c.sequence.tokens))
            assert len(c.sequence.pages) * self.limits.page_size >= c.start + c.length
            assert all(
                self.slots.refs[d] and d not in self.slots.ready_in for d in c.sequence.digests
            )

    def write(self, sequence: Sequence, start: int, length: int) -> None:
        """Every page a sequence reads must hold what its own tokens and mixture make."""
        size = self.limits.page_size
        identity = (sequence.request.tenant, sequence.mixture_key)
        for position in range(start, start + length):
            self.owner[sequence.pages[position // size], position % size] = (  # type: ignore[index]
                *identity,
                *sequence.tokens[: position + 1],
            )
        for position in range(start + length):
            content = self.owner[sequence.pages[position // size], position % size]  # type: ignore[index]
            assert content == (*identity, *sequence.tokens[: position + 1])

    def drain(self, limit: int = 2500) -> None:
        for _ in range(limit):
            if not self.scheduler.waiting_count and not self.scheduler.running_count:
                break
            self.step()
        assert not self.scheduler.waiting
        assert not self.scheduler.running
        assert self.cache.used == 0
        assert not any(self.slots.refs.values())
        self.scheduler.check_integrity()


requests = st.lists(
    st.tuples(
        st.integers(1, 20),  # prompt length
        st.integers(1, 12),  # max_tokens
        st.lists(st.sampled_from(DIGESTS), max_size=2, unique=True),
        st.sampled_from("abc"),  # tenant
        st.integers(0, 5),  # steps before the next arrives
        st.sampled_from([None, None, None, False, True]),  # leave early, dirty or not
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests,
    st.integers(9, 30),
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(2, 4),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 1.5]),
)
def test_every_request_finishes_and_nothing_leaks(
    load: list[tuple[int, int, list[str], str, int, bool | None]],
    pages: int,
    max_batch: int,
    spare: int,
    slots: int,
    delay: int,
    prefix_cache: bool,
    pace: float,
) -> None:
    """Whatever arrives, with whatever room: budgets hold, pages stay apart, all finish."""
    engine = Engine(
        pages=pages,
        max_batch=max_batch,
        step_tokens=max_batch + spare,
        slots=slots,
        delay=delay,
        prefix_cache=prefix_cache,
        pace=pace,
    )
    live: list[tuple[Sequence, bool | None]] = []
    expected = set()
    for i, (length, max_tokens, digests, tenant, wait, leave) in enumerate(load):
        prompt = tuple(range(length))
        live.append((engine.add(str(i), prompt, max_tokens, tuple(digests), tenant), leave))
        expected.add(str(i))
        for _ in range(wait):
            engine.step()
        for sequence, dirty in live:
            if dirty is not None and i % 3 == 0 and sequence.request.id not in engine.done:
                engine.scheduler.remove(sequence, dirty)
                engine.done.append(sequence.request.id)
                engine.scheduler.check_integrity()
    engine.drain()
    assert sorted(engine.done) == sorted(expected)


def test_random_long_run() -> None:
    """A thousand steps of arrivals and departures under pressure of pages and slots."""
    rng = random.Random(5)
    engine = Engine(pages=20, max_batch=6, step_tokens=12, slots=3, delay=2)
    names = 0
    for _ in range(1000):
        if rng.random() < 0.2:
            digests = tuple(rng.sample(DIGESTS, rng.choice([0, 1, 1, 2, 3])))
            prompt = (7,) * 8 + tuple(rng.randrange(3) for _ in range(rng.randrange(1, 22)))
            engine.add(str(names), prompt, rng.randrange(1, 20), digests, rng.choice("abc"))
            names += 1
        engine.step()
    engine.drain()
    assert sorted(engine.done) == sorted(map(str, range(names)))
    assert engine.scheduler.preemptions > 0
    assert engine.cache.prefix_hits > 0


def admitted(engine: Engine) -> list[str]:
    return [s.request.id for s in engine.scheduler.running]


def test_decodes_go_first_and_prompts_take_the_rest() -> None:
    engine = Engine(pages=40, max_batch=4, step_tokens=8)
    engine.add("a", (1, 2), max_tokens=20)
    engine.step()
    engine.add("long", tuple(range(17)), max_tokens=2)
    seen = [[(c.sequence.request.id, c.start, c.length, c.samples) for c in engine.step()]]
    seen += [[(c.sequence.request.id, c.start, c.length, c.samples) for c in engine.step()]]
    seen += [[(c.sequence.request.id, c.start, c.length, c.samples) for c in engine.step()]]
    assert seen == [
        [("a", 2, 1, True), ("long", 0, 7, False)],
        [("a", 3, 1, True), ("long", 7, 7, False)],
        [("a", 4, 1, True), ("long", 14, 3, True)],
    ]


def test_a_long_prompt_leaves_running_streams_their_pace() -> None:
    """Its chunks fit twice the seconds of a step without them; alone it is not cut up."""
    engine = Engine(pages=600, max_batch=4, step_tokens=1000, pace=2.0)
    stream = engine.add("stream", (1, 2), max_tokens=60)
    for _ in range(5):
        engine.step()
    long = engine.add("long", tuple(range(1000)), max_tokens=2)
    chunks = []
    while long.pending > 1:
        batch = engine.step()
        chunks += [c.length for c in batch if c.sequence is long]
        assert any(c.sequence is stream for c in batch)
    assert chunks[0] == 16
    assert max(chunks) <= 102
    assert sum(chunks) == 1000
    assert len(chunks) < 20
    engine.drain()
    engine.add("alone", tuple(range(7, 1000)), max_tokens=2)
    assert [c.length for c in engine.step()] == [993]


def test_a_cached_prefix_is_not_computed_again() -> None:
    engine = Engine(pages=40, step_tokens=40)
    prompt = tuple(range(10))
    engine.add("first", prompt, 1)
    engine.step()
    again = engine.add("again", prompt, 1)
    other = engine.add("other", prompt, 1, tenant="u")
    mixed = engine.add("mixed", prompt, 1, (DIGESTS[0],))
    lengths = {c.sequence.request.id: c.length for c in engine.step()}
    assert lengths == {"again": 2, "other": 10, "mixed": 10}
    assert (again.cached_tokens, other.cached_tokens, mixed.cached_tokens) == (8, 0, 0)
    assert (engine.cache.prefix_queries, engine.cache.prefix_hits) == (40, 8)


def test_what_can_never_fit_is_known_in_advance() -> None:
    """The last generated token needs no room: nothing is computed from it."""
    engine = Engine(pages=9, page_size=4)
    assert engine.scheduler.fits(30, 3)
    assert not engine.scheduler.fits(30, 4)
    engine.add("full", tuple(range(30)), 3)
    engine.drain()


def test_the_youngest_is_preempted_and_keeps_what_it_generated() -> None:
    engine = Engine(pages=7, page_size=4, step_tokens=40, max_batch=2, prefix_cache=False)
    old = engine.add("old", (1,) * 8, 14)
    young = engine.add("young", (2,) * 7, 14)
    while not young.preemptions:
        engine.step()
    kept = list(young.tokens)
    assert old.preemptions == 0
    assert len(kept) > 7
    assert engine.scheduler.waiting == [young]
    engine.drain()
    assert young.tokens[: len(kept)] == kept
    assert (old.preemptions, engine.done) == (0, ["old", "young"])


def test_a_request_without_pages_is_not_passed() -> None:
    """Small requests behind a large one would otherwise keep it out for ever."""
    engine = Engine(pages=9, page_size=4, max_batch=4, step_tokens=40)
    engine.add("running", (1,) * 8, 8)
    engine.step()
    engine.add("large", (2,) * 28, 2, tenant="u")
    for i in range(5):
        engine.add(f"small{i}", (3 + i,), 2)
    engine.drain()
    assert engine.done[:2] == ["running", "large"]


def test_tenants_are_served_alike_however_much_they_ask_for() -> None:
    engine = Engine(pages=200, max_batch=2, step_tokens=16)
    for i in range(40):
        engine.add(f"greedy{i}", (1, 2, 3, 4), 4, tenant="greedy")
    for _ in range(6):
        engine.step()
    for i in range(8):
        engine.add(f"modest{i}", (1, 2, 3, 4), 4, tenant="modest")
    before = len(engine.done)
    while sum(n.startswith("modest") for n in engine.done) < 8:
        engine.step()
    assert sum(n.startswith("greedy") for n in engine.done[before:]) <= 10


def test_idle_time_earns_no_claim_to_the_machine() -> None:
    """A tenant that comes late starts level with the others instead of being served alone."""
    engine = Engine(pages=200, max_batch=2, step_tokens=16)
    for i in range(60):
        engine.add(f"early{i}", (1, 2, 3, 4), 4, tenant="early")
    for _ in range(80):
        engine.step()
    for i in range(30):
        engine.add(f"late{i}", (1, 2, 3, 4), 4, tenant="late")
    before = len(engine.done)
    while len(engine.done) < before + 20:
        engine.step()
    assert 7 <= sum(n.startswith("late") for n in engine.done[before:]) <= 13


def test_adapters_of_one_tenant_are_served_alike() -> None:
    engine = Engine(pages=200, max_batch=2, step_tokens=16)
    for i in range(30):
        engine.add(f"x{i}", (1, 2, 3, 4), 4, (DIGESTS[0],))
    for i in range(5):
        engine.add(f"y{i}", (1, 2, 3, 4), 4, (DIGESTS[1],))
    while sum(n.startswith("y") for n in engine.done) < 5:
        engine.step()
    assert sum(n.startswith("x") for n in engine.done) <= 7


def test_adapters_of_those_next_in_line_are_loaded_while_all_places_are_taken() -> None:
    """The nearest first, and only into slots that nobody in line needs."""
    engine = Engine(pages=200, max_batch=2, step_tokens=16, slots=4, delay=2)
    for i in range(2):
        engine.add(f"running{i}", max_tokens=40, digests=(DIGESTS[i],))
    while engine.scheduler.running_count < 2:
        engine.step()
    for i in range(2, 6):
        engine.add(f"waiting{i}", digests=(DIGESTS[i],))
    for _ in range(8):
        engine.step()
    assert set(engine.slots.refs) == set(DIGESTS[:4])
    assert engine.scheduler.waiting_count == 4
    engine.drain()


def test_adapters_in_demand_wait_a_bounded_time_behind_ever_new_ones() -> None:
    """Each new adapter is less served, yet only so many requests pass one that is in line."""
    engine = Engine(pages=200, max_batch=2, step_tokens=16, slots=8)
    names = 0

    def newcomers() -> None:
        nonlocal names
        while engine.scheduler.waiting_count < 6:
            engine.add(f"new{names}", max_tokens=2, digests=(f"{names + 8:064x}",))
            names += 1

    engine.add("popular", digests=(DIGESTS[0],))
    while "popular" not in engine.done:
        newcomers()
        engine.step()
    engine.add("again", digests=(DIGESTS[0],))
    before = len(engine.done)
    while "again" not in engine.done:
        newcomers()
        engine.step()
    # In line before it, running with it, and two batches.
    assert len(engine.done) - before <= 6 + 4 + 2 * 2
    engine.scheduler.check_integrity()


def test_loading_adapters_stop_nobody() -> None:
    """While one request waits for its load all others are admitted and finish."""
    engine = Engine(pages=200, max_batch=2, step_tokens=16, slots=3, delay=1)
    engine.add("warm", digests=(DIGESTS[0],))
    engine.drain()
    engine.slots.delay = 400
    engine.add("slow", digests=(DIGESTS[1],))
    for i in range(30):
        engine.add(f"fast{i}", max_tokens=4, digests=(DIGESTS[0],) if i % 2 else ())
    for _ in range(100):
        engine.step()
    assert len(engine.done) == 31
    assert "slow" not in engine.done
    engine.drain()


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("tenant", ["t", "other"])
def test_no_adapter_starves_for_want_of_slots(wanted: int, tenant: str) -> None:
    """A stream of requests for the resident adapters stops in time for one that needs others."""
    engine = Engine(pages=200, max_batch=4, step_tokens=16, slots=2)
    names = 0

    def crowd() -> None:
        nonlocal names
        while engine.scheduler.waiting_count < 6:
            engine.add(f"crowd{names}", max_tokens=2 + names % 5, digests=(DIGESTS[names % 2],))
            names += 1

    for _ in range(20):
        crowd()
        engine.step()
    engine.add("rare", max_tokens=2, digests=tuple(DIGESTS[2 : 2 + wanted]), tenant=tenant)
    start = engine.steps
    while "rare" not in engine.done:
        crowd()
        engine.step()
        assert engine.steps < start + 60


def test_who_leaves_the_line_for_slots_holds_up_nobody() -> None:
    """A request that has waited long enough to be served next, and is cancelled then."""
    engine = Engine(pages=200, max_batch=4, step_tokens=16, slots=2)
    for i in range(2):
        engine.add(f"long{i}", max_tokens=60, digests=(DIGESTS[i],))
    engine.step()
    rare = engine.add("rare", digests=(DIGESTS[2],))
    for i in range(40):
        engine.add(f"short{i}", max_tokens=2, digests=(DIGESTS[0],))
        engine.step()
    waiting = engine.scheduler.waiting_count  # behind him
    engine.step()
    assert engine.scheduler.waiting_count == waiting
    engine.scheduler.remove(rare)
    for _ in range(12):
        engine.step()
    assert "long0" not in engine.done
    assert engine.scheduler.waiting_count < waiting - 8


def test_requests_for_the_base_pass_those_that_wait_for_slots() -> None:
    engine = Engine(pages=200, max_batch=4, step_tokens=16, slots=2)
    engine.add("long", max_tokens=100, digests=(DIGESTS[0],))
    engine.step()
    engine.add("both", digests=(DIGESTS[1], DIGESTS[2]))
    for i in range(10):
        engine.add(f"base{i}")
    for _ in range(30):
        engine.step()
    assert len(engine.done) == 10
    assert admitted(engine) == ["long"]


def test_behind_somebody_without_slots_nobody_starts_loads() -> None:
    """The slot that becomes free is not theirs, and loads would evict what he waits for."""
    engine = Engine(pages=200, max_batch=4, step_tokens=16, slots=3)
    for i in range(2):
        engine.add(f"long{i}", max_tokens=30, digests=(DIGESTS[i],))
    engine.step()
    engine.add("both", digests=(DIGESTS[2], DIGESTS[3]))
    engine.add("behind", digests=(DIGESTS[4],))
    for _ in range(20):
        engine.step()
    assert set(engine.slots.refs) == set(DIGESTS[:3])
    engine.drain()
    assert engine.done.index("both") < engine.done.index("behind")


def test_what_preemption_repeats_is_not_charged_again() -> None:
    queue = FairQueue(patience=8)
    sequence = Sequence(Request("r", (1,) * 6), TextStream(str))
    queue.enter(sequence)
    queue.charge(sequence, 0, 6)
    once = queue.rank(sequence)
    queue.charge(sequence, 0, 6)
    assert queue.rank(sequence) == once == (6.0, True, 6.0)
    queue.charge(sequence, 4, 8)
    assert queue.rank(sequence) == (10.0, True, 10.0)


def test_no_tenant_takes_more_slots_while_another_waits_for_one() -> None:
    engine = Engine(pages=200, max_batch=8, step_tokens=32, slots=4)
    for i in range(4):
        engine.add(f"a{i}", max_tokens=10 + 10 * i, digests=(DIGESTS[i],), tenant="a")
    engine.step()
    for i in range(8):
        engine.add(f"more{i}", max_tokens=60, digests=(DIGESTS[i % 4],), tenant="a")
    for i in range(2):
        engine.add(f"b{i}", max_tokens=60, digests=(DIGESTS[4 + i],), tenant="b")
    for _ in range(26):
        engine.step()
    users = Counter(
        s.request.tenant for s in engine.scheduler.running if "more" not in s.request.id
    )
    assert users == {"a": 2, "b": 2}


def test_ending_a_request_frees_its_pages_and_slots_at_once() -> None:
    engine = Engine()
    running = engine.add("running", digests=(DIGESTS[0],))
    engine.step()
    waiting = engine.add("waiting")
    for sequence in (running, waiting):
        engine.scheduler.remove(sequence)
    assert engine.cache.used == 0
    assert engine.slots.refs == {DIGESTS[0]: 0}
    assert engine.step() == ()
    with pytest.raises((KeyError, ValueError)):
        engine.scheduler.remove(running)


def test_pages_of_a_request_gone_wrong_are_not_found_again() -> None:
    engine = Engine(step_tokens=40)
    sick = engine.add("sick", tuple(range(9)), 4)
    batch = engine.scheduler.schedule(0.0)
    engine.scheduler.remove(sick, dirty=True)
    engine.scheduler.advance(batch)
    well = engine.add("well", tuple(range(9)), 4)
    engine.step()
    assert well.cached_tokens == 0


def test_broken_books_are_reported() -> None:
    engine = Engine()
    sequence = engine.add("a", max_tokens=9)
    engine.step()
    sequence.pages.pop()
    with pytest.raises(IntegrityError, match="references"):
        engine.scheduler.check_integrity()


def test_equal_adapters_are_merged_and_weightless_ones_dropped() -> None:
    a, b, c = DIGESTS[:3]
    weights = [(b, 0.5), (a, 1.0), (b, -2.0), (c, 1.0), (c, -1.0)]
    mixture = Mixture(tuple(AdapterWeight(d, w, d) for d, w in weights))
    sequence = Sequence(Request("r", (1,), mixture=mixture), TextStream(str))
    assert (sequence.digests, sequence.weights) == ((a, b), ((a, 1.0), (b, -1.5)))


def flooded(max_batch: int = 8, slots: int = 8) -> Engine:
    """All places taken by tenant a, with more of it in line."""
    engine = Engine(pages=400, max_batch=max_batch, step_tokens=64, slots=slots)
    for i in range(3 * max_batch):
        engine.add(f"a{i}", max_tokens=60, tenant="a")
    for _ in range(5):
        engine.step()
    assert len(engine.scheduler.running) == max_batch
    return engine


def test_a_flood_makes_way_for_a_tenant_that_has_few_places() -> None:
    """It does not wait for an answer of the other to end; the youngest goes back in line."""
    engine = flooded()
    quiet = engine.add("quiet", max_tokens=3, tenant="b")
    engine.step()
    engine.step()
    assert quiet.output
    assert engine.scheduler.preemptions == 1
    assert "a0" in admitted(engine)
    assert "a7" not in admitted(engine)
    engine.drain()
    assert len(engine.done) == 25


def test_whoever_makes_way_keeps_more_than_the_other_gets() -> None:
    """Two that want everything settle without throwing each other out again and again."""
    engine = flooded()
    for i in range(16):
        engine.add(f"b{i}", max_tokens=60, tenant="b")
    for _ in range(30):
        engine.step()
        counts = Counter(s.request.tenant for s in engine.scheduler.running)
        assert counts["a"] >= 4
    assert 2 <= counts["b"] <= engine.scheduler.preemptions <= 4
    engine.drain()
    assert len(engine.done) == 40


def test_nobody_makes_way_for_adapters_that_are_not_there_yet() -> None:
    engine = flooded()
    engine.slots.delay = 4
    engine.add("quiet", max_tokens=3, tenant="b", digests=(DIGESTS[0],))
    for _ in range(3):
        engine.step()
        assert engine.scheduler.preemptions == 0
    for _ in range(6):
        engine.step()
    assert engine.scheduler.preemptions == 1
    assert "quiet" in [*admitted(engine), *engine.done]
    engine.drain()


def test_a_flood_that_holds_the_pages_makes_way_too() -> None:
    engine = Engine(pages=33, max_batch=16, step_tokens=64, prefix_cache=False)
    for i in range(8):
        engine.add(f"a{i}", tuple(range(12)), max_tokens=16, tenant="a")
    for _ in range(3):
        engine.step()
    quiet = engine.add("quiet", tuple(range(12)), max_tokens=2, tenant="b")
    before = len(engine.done)
    for _ in range(4):
        engine.step()
    assert quiet.output
    assert len(engine.done) - before <= 1
    engine.drain()


def test_few_streams_prompts_are_not_held_up_by_anothers_many() -> None:
    """The pace of a flood's streams limits its own prompts more than a quiet tenant's."""

    def steps(tenant: str) -> int:
        engine = Engine(pages=900, max_batch=9, step_tokens=1000, pace=2.0)
        for i in range(8):
            engine.add(f"a{i}", max_tokens=90, tenant="a")
        for _ in range(30):
            engine.step()
        long = engine.add("long", tuple(range(400)), max_tokens=2, tenant=tenant)
        count = 0
        while not long.output:
            batch = engine.step()
            assert sum(c.length == 1 for c in batch) >= 8
            count += 1
        return count

    assert 2 * steps("b") <= steps("a")
