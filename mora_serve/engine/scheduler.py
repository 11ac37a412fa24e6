"""What each step computes: pure policy, no tensors.

A step has a budget of tokens. Every running request that decodes gets one; the rest, as far as
the streams' pace allows (see pace.py), goes to prompts, running or waiting, always to the least
served tenant next (see fairness.py). A tenant with few places beside another's many goes first: it
waits neither for a place nor for the pace of the other's streams.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from mora_serve.config import EngineConfig
from mora_serve.engine.fairness import FairQueue
from mora_serve.engine.kv_cache import IntegrityError, KVCache
from mora_serve.engine.pace import MIN_TOKENS, StepPace
from mora_serve.engine.sequence import Sequence


class Residency(Protocol):
    """The adapters' device slots, as far as scheduling needs to know."""

    def hold(self, digests: tuple[str, ...]) -> bool:
        """True: all are in slots and each has one more reference.

        False: not yet. Nothing is held; loads that can start have been started.
        """

    def drop(self, digests: tuple[str, ...]) -> None:
        """Give back one reference each."""

    def assigned(self, digests: tuple[str, ...]) -> bool:
        """Every one has a slot, be it loaded or still loading: only time is missing."""

    @property
    def can_prefetch(self) -> bool:
        """Whether loads ahead of need may be started now."""

    def prefetch(self, line: list[tuple[str, ...]]) -> bool:
        """Start loads for the requests next in line, at the expense of nobody who needs a slot.

        True: there is nothing more to start for this line.
        """


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start`` to ``start + length`` of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    length: int
    samples: bool  # it reaches the end of the tokens: the next one is sampled from it


Batch = tuple[Chunk, ...]

PATIENCE = 3  # of a tenant with many adapters, every one in demand has a place in 4
WIDE = 4  # times the limit of prompt tokens, for a tenant whose own streams are few
BURST = 4  # times a step's tokens, by which such a tenant may be served more than another
LINE = 16  # requests next in line whose adapters are loaded ahead


class Scheduler:
    """Admits, orders and preempts requests.

    Guarantees: the oldest running request is never preempted and always progresses; a request
    without room in the cache stops all admissions until it fits; a request passed over
    ``max_batch // 4`` times for want of adapter slots stops all admissions that use other
    adapters until it has them. Requests whose adapters are merely loading stop nobody. Where a
    tenant holds the places or the pages that a less served one needs, and more than twice as many,
    its youngest request goes back in line.
    """

    def __init__(self, limits: EngineConfig, cache: KVCache, residency: Residency) -> None:
        self.preemptions = 0
        self._limits = limits
        self._cache = cache
        self._residency = residency
        self._patience = max(1, limits.max_batch // 4)
        self._queue = FairQueue(PATIENCE)
        self._pace = StepPace(limits.step_pace, limits.step_tokens)
        self._running: dict[Sequence, None] = {}
        self.started: list[Sequence] = []  # by the last schedule(), for the first time
        self.short = False  # the next in line found too few pages in it
        self._places: Counter[str] = Counter()  # tenant -> running requests
        self._largest: str | None = None  # the tenant with most of them when the step began
        self._orders = 0
        self._claimant: Sequence | None = None  # the next free slots are its
        self._held: dict[str, Counter[str]] = {}  # tenant -> adapter -> running requests
        self._prefetched = False  # for the line as it is now

    @property
    def running(self) -> list[Sequence]:
        """Admitted requests, oldest first."""
        return sorted(self._running, key=_order)

    @property
    def waiting(self) -> list[Sequence]:
        """Requests in line, oldest first."""
        return sorted(self._queue, key=_order)

    @property
    def running_count(self) -> int:
        """Number of admitted requests."""
        return len(self._running)

    @property
    def waiting_count(self) -> int:
        """Number of requests in line."""
        return len(self._queue)

    def fits(self, prompt_length: int, max_tokens: int) -> bool:
        """Whether such a request could ever run; the last token's keys are never needed."""
        return self._cache.pages_for(prompt_length + max_tokens - 1) <= self._cache.usable

    def add(self, sequence: Sequence) -> None:
        """Put a new request in line."""
        sequence.order = self._orders
        self._orders += 1
        self._queue.enter(sequence)
        self._queue.push(sequence)
        self._prefetched = False

    def remove(self, sequence: Sequence, dirty: bool = False) -> None:
        """End a request, running or waiting; its pages and slots are free at once.

        ``dirty``: its numbers were not finite (see KVCache.release). Call it before
        ``advance`` then, so that its pages do not enter the prefix cache. KeyError or
        ValueError for a request that is neither.
        """
        if sequence in self._running:
            self._stop(sequence, dirty)
        else:
            self._queue.remove(sequence)
        self._queue.leave(sequence)
        self._prefetched = False
        if sequence is self._claimant:
            self._claimant = None

    def schedule(self, now: float, spent: int = 0) -> Batch:
        """Plan one step: decodes and other single tokens first, then longer prompt chunks.

        ``spent`` tokens of its budget are used up, but never those of decodes, nor more than half.
        """
        self.started = []
        self._largest = max(self._places, key=self._places.__getitem__, default=None)
        guest = self._make_way()
        decodes: list[Chunk] = []
        most = self._limits.step_tokens
        budget = max(most - spent, most // 2, self.running_count)
        short = False
        for sequence in self.running:
            if sequence not in self._running or sequence.pending != 1 or not budget:
                continue
            if self._grow(sequence):
                decodes.append(self._plan(sequence, 1))
                budget -= 1
            else:
                short = True
        paced = self._paced(budget, len(decodes), spent)
        wide = min(budget, WIDE * paced)
        chunks = self._prompts(paced, wide, now, admit=not short, guest=guest)
        self._prefetch()
        return tuple(sorted(decodes + chunks, key=lambda chunk: chunk.length > 1))

    def measured(self, batch: Batch, seconds: float) -> None:
        """How long the step took: what the next steps' chunks are sized by."""
        decodes = sum(chunk.length == 1 for chunk in batch)
        self._pace.observe(decodes, sum(c.length for c in batch) - decodes, seconds)

    def advance(self, batch: Batch) -> None:
        """After the step: its tokens are in their pages. Removed requests are left alone."""
        for chunk in batch:
            sequence = chunk.sequence
            if sequence in self._running:
                sequence.computed = chunk.start + chunk.length
                self._cache.commit(
                    sequence.pages, sequence.chain, sequence.tokens, sequence.computed
                )

    def reset(self) -> None:
        """Forget every request: nobody runs, nobody waits. Their pages and slots are not given."""
        self._queue = FairQueue(PATIENCE)
        self._running, self._held = {}, {}
        self._claimant, self._prefetched = None, False

    def check_integrity(self) -> None:
        """Raise IntegrityError where the books of pages, slots and queues disagree."""
        self._cache.check_integrity([s.pages for s in self._running])
        held: dict[str, Counter[str]] = {}
        for s in self._running:
            if s.digests:
                held.setdefault(s.request.tenant, Counter()).update(s.digests)
        if self._places != Counter(s.request.tenant for s in self._running):
            raise IntegrityError(f"places: {self._places} are counted, {self._running} run")
        if held != self._held:
            raise IntegrityError(f"slots: running requests use {held}, counted {self._held}")
        if len(self._running) > self._limits.max_batch:
            raise IntegrityError(f"{len(self._running)} requests run")
        if any(s.pages or s.computed for s in self._queue):
            raise IntegrityError("a waiting request holds pages")
        if not self._running and not len(self._queue) and not self._queue.idle:
            raise IntegrityError("nobody runs or waits, but the queue counts somebody as active")

    def _paced(self, budget: int, decodes: int, spent: int) -> int:
        """What prompts may have of a budget in tokens beside so many decodes."""
        unfinished = sum(s.pending > 1 for s in self._running)
        room = self._limits.max_batch - self.running_count
        prompts = unfinished + min(self.waiting_count, room)
        limit = self._pace.limit(decodes, prompts)
        return min(budget, max(limit - spent, min(limit, MIN_TOKENS)))

    def _prompts(
        self, budget: int, wide: int, now: float, admit: bool, guest: Sequence | None
    ) -> list[Chunk]:
        """Chunks for unfinished prompts and admissions, the least served tenant first.

        A ``guest`` is let in before all others: somebody has made way for it. Of ``wide`` tokens,
        those beyond the budget are for tenants that others' streams outnumber.
        """
        chunks: list[Chunk] = []
        heap = [self._entry(s) for s in self._running if s.pending > 1]
        round_ = _Round(open=admit, tries=4 * self._limits.max_batch)

        def few(sequence: Sequence) -> bool:
            return self._few(sequence.request.tenant)

        def room(sequence: Sequence) -> int:
            return min(sequence.pending, wide if few(sequence) else min(budget, wide))

        def plan(sequence: Sequence) -> None:
            nonlocal budget, wide
            chunks.append(self._plan(sequence, room(sequence)))
            budget = max(0, budget - chunks[-1].length)
            wide -= chunks[-1].length

        if admit and wide and len(self._running) < self._limits.max_batch:
            for first in (self._claimant, guest):
                if first is not None and room(first) and self._admit(first, round_, now):
                    plan(first)
            heap += [self._entry(s) for s in self._queue.heads() if s is not self._claimant]
        heapq.heapify(heap)
        while heap and wide:
            entry = heapq.heappop(heap)
            sequence = entry[-1]
            fresh = self._entry(sequence)
            if fresh != entry:  # its tenant was served meanwhile
                heapq.heappush(heap, fresh)
                continue
            if not room(sequence):
                continue
            if sequence not in self._running:
                if not self._admit(sequence, round_, now):
                    continue
                follower = self._queue.head(sequence)
                if follower is not None:
                    heapq.heappush(heap, self._entry(follower))
            plan(sequence)
        self.short = not round_.open and admit
        return chunks

    def _few(self, tenant: str) -> bool:
        """Whether a tenant has few places beside the one with most, and no more service.

        But for a burst: who comes back from idle starts level, and has a prompt to be read.
        """
        largest = self._largest
        if largest is None or 2 * self._places[tenant] > self._places[largest]:
            return False
        burst = BURST * self._limits.step_tokens
        return self._queue.served(tenant) <= self._queue.served(largest) + burst

    def _make_way(self) -> Sequence | None:
        """Send a request of the tenant with most places back in line for one that has few.

        That is one that even then has at most half as many (see _few): whoever makes way never
        comes back this way. Returns whom for; its adapters are in their slots.
        """
        full = len(self._running) >= self._limits.max_batch
        tenant = self._largest
        if not (full or self.short) or self._claimant is not None or tenant is None:
            return None
        most = self._places[tenant]
        heads = self._queue.heads()
        guest = min(heads, key=self._entry, default=None)
        if guest is None or 2 * (self._places[guest.request.tenant] + 1) > most:
            return None
        if not self._few(guest.request.tenant):
            return None
        victim = max((s for s in self._running if s.request.tenant == tenant), key=_order)
        if guest.digests:
            if not self._residency.hold(guest.digests):
                return None
            self._residency.drop(guest.digests)
        self._preempt(victim)
        return guest

    def _prefetch(self) -> None:
        """Load ahead for those next in line. They may have to wait for anything, or for nothing."""
        if self._prefetched or not self._residency.can_prefetch:
            return
        heads = (self._entry(s) for s in self._queue.heads() if s.digests)
        line = heapq.nsmallest(LINE, heads)
        nearest = [entry[-1].digests for entry in line]
        if self._claimant is not None:
            nearest.insert(0, self._claimant.digests)
        self._prefetched = self._residency.prefetch(nearest)

    def _entry(self, sequence: Sequence) -> _Entry:
        tenant, in_time, since = self._queue.rank(sequence)
        waiting = sequence not in self._running
        late = not self._few(sequence.request.tenant)
        return late, tenant, waiting, in_time, since, sequence.order, sequence

    def _plan(self, sequence: Sequence, length: int) -> Chunk:
        start, end = sequence.computed, sequence.computed + length
        self._queue.charge(sequence, start, end)
        return Chunk(sequence, start, length, end == len(sequence.tokens))

    def _admit(self, sequence: Sequence, round_: _Round, now: float) -> bool:
        """Slots, then pages for all its tokens; nothing is kept of half a success."""
        if not round_.open or len(self._running) >= self._limits.max_batch:
            return False
        if sequence.digests and not self._hold(sequence, round_):
            return False
        cache = self._cache
        pages = cache.match(sequence.chain, sequence.tokens)
        cached = len(pages) * cache.page_size
        missing = cache.pages_for(len(sequence.tokens)) - len(pages)
        # One page for each that runs: whoever comes in must not be thrown out at once.
        if missing + len(self._running) > cache.free:
            cache.release(pages)
            if sequence.digests:
                self._residency.drop(sequence.digests)
            round_.open = False
            return False
        cache.extend(pages, len(sequence.tokens))
        self._queue.remove(sequence)
        self._prefetched = False
        self._running[sequence] = None
        self._places[sequence.request.tenant] += 1
        sequence.pages, sequence.computed = pages, cached
        sequence.skips, sequence.loading = 0, False
        if sequence is self._claimant:
            self._claimant = None
        if sequence.admitted is None:
            sequence.admitted, sequence.cached_tokens = now, cached
            self.started.append(sequence)
            cache.count(sequence.prompt_length, cached)
        if sequence.digests:
            self._held.setdefault(sequence.request.tenant, Counter()).update(sequence.digests)
            self._overtake(round_)
        return True

    def _hold(self, sequence: Sequence, round_: _Round) -> bool:
        """Take the adapters' slots, unless somebody else has the better claim to them."""
        tenant = sequence.request.tenant
        wanted = set(sequence.digests)
        claimant = self._claimant
        if claimant not in (None, sequence) and not wanted <= set(claimant.digests):
            return False
        if round_.tries == 0 or self._slots_of(tenant) > round_.least:
            return False
        round_.tries -= 1
        assigned = self._residency.assigned(sequence.digests)
        if sequence.loading and not assigned:  # robbed before it could take its slots: once only
            self._claim(sequence)
        # Behind somebody without slots nobody starts loads: the next free slot is not theirs.
        if assigned or not round_.starved:
            if self._residency.hold(sequence.digests):
                return True
            if self._residency.assigned(sequence.digests):
                sequence.loading = True
                return False
        round_.starved.append(sequence)
        round_.least = min(round_.least, self._slots_of(tenant))
        if sequence.preemptions:
            self._claim(sequence)
        return False

    def _slots_of(self, tenant: str) -> int:
        return len(self._held.get(tenant, ()))

    def _claim(self, sequence: Sequence) -> None:
        if self._claimant is None:
            self._claimant = sequence

    def _overtake(self, round_: _Round) -> None:
        """Those passed over for want of slots remember it, and at some point have enough."""
        for other in round_.starved:
            other.skips += 1
            if other.skips >= self._patience:
                self._claim(other)

    def _grow(self, sequence: Sequence) -> bool:
        """Room for one more token, at the expense of younger requests only."""
        while not self._cache.extend(sequence.pages, len(sequence.tokens)):
            victim = max(self._running, key=_order)
            if victim is sequence:
                return False
            self._preempt(victim)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._stop(victim)
        victim.preemptions += 1
        self.preemptions += 1
        self._queue.push(victim)

    def _stop(self, sequence: Sequence, dirty: bool = False) -> None:
        self._prefetched = False
        del self._running[sequence]
        self._places[sequence.request.tenant] -= 1
        if not self._places[sequence.request.tenant]:
            del self._places[sequence.request.tenant]
        self._cache.release(sequence.pages, dirty)
        sequence.pages, sequence.computed = [], 0
        if sequence.digests:
            self._residency.drop(sequence.digests)
            held = self._held[sequence.request.tenant]
            held.subtract(sequence.digests)
            for digest in sequence.digests:
                if not held[digest]:
                    del held[digest]
            if not held:
                del self._held[sequence.request.tenant]


# (whether its tenant has places enough, service of the tenant, waiting, what speaks for its adapter
# set: see FairQueue.rank, order, who)
_Entry = tuple[bool, float, bool, bool, float, int, Sequence]


@dataclass(slots=True)
class _Round:
    """What one step's admissions have found out so far."""

    open: bool  # False: the next in line found no pages, nobody may pass it
    tries: int  # looks at the slots left
    starved: list[Sequence] = field(default_factory=list)  # found no free slot
    least: float = math.inf  # slots of the tenant that has fewest among the starved


def _order(sequence: Sequence) -> int:
    return sequence.order
