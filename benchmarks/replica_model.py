"""A model of one replica: the engine's policies, with measured seconds in place of its work.

Slots are least recently used first with reference counts; loads run one after another beside the
steps and are seen at the end of one; requests that wait for a load stop nobody, and one passed over
``max_batch // 4`` times for want of a slot gets the next (see engine/scheduler.py and
engine/adapter_pool.py). Prompts are read in chunks that keep the streams' pace (engine/pace.py).
Left out, as they need more than seconds: pages of the key/value cache, the prefix cache, tenants,
the fair order of adapter sets, loads ahead of need beyond the line's.

Steps without prompts between two events are one event of the simulation, however many they are.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Load = Literal["load", "first_load"]

MIN_TOKENS = 16  # a prompt gets as many a step, whatever runs (engine/pace.py)


@dataclass(frozen=True)
class Profile:
    """Seconds as measured on a server.

    ``step`` is the seconds of a step by the answers that grow in it, ``beside`` by the same the
    seconds that first tokens took besides their steps (the way to the engine and back, and what
    else held them up): all that were measured, so that the model has their spread too.
    ``load`` is one adapter from the host's memory into a slot, ``first_load`` one that the host
    has to read and convert; ``missed`` and ``first_missed`` are what ``beside`` is, of requests
    that waited for these (as ``beside`` where they are empty).
    """

    step: Mapping[int, float]
    prompt_token: float
    beside: Mapping[int, Sequence[float]]
    load: float
    first_load: float
    missed: Sequence[float] = ()
    first_missed: Sequence[float] = ()

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Profile:
        """From a file; KeyError where one is missing."""
        return cls(
            step={int(k): float(v) for k, v in values["step"].items()},
            prompt_token=float(values["prompt_token"]),
            beside={int(k): list(map(float, v)) for k, v in values["beside"].items()},
            load=float(values["load"]),
            first_load=float(values["first_load"]),
            missed=tuple(map(float, values["missed"])),
            first_missed=tuple(map(float, values["first_missed"])),
        )


def between(points: Mapping[int, float], x: float) -> float:
    """Linear between the points; beyond the last as between the last two, before the first flat."""
    xs = sorted(points)
    if x <= xs[0] or len(xs) == 1:
        return points[xs[0]]
    right = min(max(bisect.bisect_left(xs, x), 1), len(xs) - 1)
    a, b = xs[right - 1], xs[right]
    return points[a] + (points[b] - points[a]) * (x - a) / (b - a)


@dataclass(frozen=True)
class Limits:
    """The engine's settings of the same names; ``host`` is adapters kept in the host's memory."""

    slots: int = 32
    max_batch: int = 64
    step_tokens: int = 512
    step_pace: float = 1.75
    max_queue: int = 1024
    host: int = 10_000


@dataclass(slots=True, eq=False)
class Job:
    """One request: its adapter, tokens, and the seconds at which it was due and answered."""

    due: float
    adapter: int
    prompt: int
    output: int
    first_token: float = math.nan
    ended: float = math.nan
    refused: bool = False
    left: int = 0  # prompt tokens
    skips: int = 0
    beside: int = 0  # that run when it arrives
    load: Load | None = None  # that it waited for


@dataclass(slots=True)
class _Slot:
    ready: bool = False
    references: int = 0
    used: bool = False
    load: Load = "load"


class Tables:
    """A profile's seconds by rows, looked up often."""

    def __init__(self, profile: Profile, limits: Limits, seed: int = 0) -> None:
        rows = range(limits.max_batch + 1)
        self.step = [between(profile.step, n) for n in rows]
        known = profile.beside
        self._beside = [known[min(known, key=lambda k: (abs(k - n), k))] for n in rows]
        self._missed = {"load": profile.missed, "first_load": profile.first_missed}
        self._rng = random.Random(seed)
        self.prompt_token = profile.prompt_token
        self.load, self.first_load = profile.load, profile.first_load
        self.limits = limits

    def beside(self, running: int, load: Load | None = None) -> float:
        """One of the waits measured after such a load, or beside about so many answers, drawn."""
        missed = self._missed[load] if load else ()
        return self._rng.choice(missed or self._beside[min(running, len(self._beside) - 1)])

    def chunk(self, decodes: int, prompts: int) -> int:
        """Prompt tokens of a step beside so many answers (StepPace.limit, with known costs)."""
        limits = self.limits
        if not decodes or not limits.step_pace:
            return limits.step_tokens
        allowed = (limits.step_pace - 1) * self.step[decodes] * max(1.0, prompts / decodes)
        tokens = int(allowed / self.prompt_token) if self.prompt_token else limits.step_tokens
        return max(MIN_TOKENS, min(limits.step_tokens - decodes, tokens))


@dataclass(slots=True, eq=False)
class Replica:
    """One server. ``wake(time, replica, version)`` asks for a call of ``boundary`` then.

    ``changed(replica, adapter, resident)`` is told of slots as they are taken and lost.
    """

    index: int
    tables: Tables
    wake: Callable[[float, Replica, int], None]
    changed: Callable[[int, int, bool], None]
    hits: int = 0
    loads: int = 0
    served: int = 0
    busy_seconds: float = 0.0
    waiting: deque[Job] = field(default_factory=deque)
    slots: OrderedDict[int, _Slot] = field(default_factory=OrderedDict)
    host: OrderedDict[int, None] = field(default_factory=OrderedDict)
    version: int = 0
    _reading: list[Job] = field(default_factory=list)
    _growing: list[tuple[int, int, Job]] = field(default_factory=list)  # by their last step
    _chunks: list[Job] = field(default_factory=list)  # read to their end by the step under way
    _loading: deque[tuple[float, int]] = field(default_factory=deque)
    _claimant: Job | None = None
    _loader_free: float = 0.0
    _steps: int = 0
    _planned: int = 0  # steps under way
    _start: float = 0.0
    _each: float = 0.0  # seconds of one of them
    _working: bool = False
    _orders: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def running(self) -> int:
        """Requests that have a place."""
        return len(self._reading) + len(self._growing)

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return self.running + len(self.waiting)

    def arrive(self, now: float, job: Job) -> bool:
        """Take a request in line, or refuse it: the line is full."""
        if len(self.waiting) >= self.tables.limits.max_queue:
            job.refused = True
            return False
        job.left, job.beside = job.prompt, self.running
        self.waiting.append(job)
        self._look(now)
        return True

    def boundary(self, now: float, version: int) -> list[Job]:
        """A step ends, or a load: what is done, what comes next. The requests that ended."""
        if version != self.version:
            return []
        ended = self._account(now)
        self._settle(now)
        self._admit(now)
        self._plan(now)
        return ended

    def _look(self, now: float) -> None:
        """Something has come: look at it at the end of the step under way."""
        if not self._working:
            self._at(now)
        elif self._planned > 1:
            done = max(1, math.ceil((now - self._start) / self._each - 1e-9))
            if done < self._planned:
                self._planned = done
                self._at(self._start + done * self._each)

    def _at(self, time: float) -> None:
        self.version += 1
        self.wake(time, self, self.version)

    def _account(self, now: float) -> list[Job]:
        ended: list[Job] = []
        if not self._working:
            return ended
        self._steps += self._planned
        self.busy_seconds += now - self._start
        self._working = False
        while self._growing and self._growing[0][0] <= self._steps:
            ended.append(heapq.heappop(self._growing)[2])
        for job in self._chunks:
            job.first_token = now + self.tables.beside(job.beside, job.load)
            self._reading.remove(job)
            if job.output > 1:
                entry = (self._steps + job.output - 1, next(self._orders), job)
                heapq.heappush(self._growing, entry)
            else:
                ended.append(job)
        self._chunks = []
        for job in ended:
            job.ended = now
            self.slots[job.adapter].references -= 1
        self.served += len(ended)
        return ended

    def _settle(self, now: float) -> None:
        while self._loading and self._loading[0][0] <= now + 1e-12:
            self.slots[self._loading.popleft()[1]].ready = True

    def _admit(self, now: float) -> None:
        """Who waits and has what it needs begins, the oldest first."""
        most = self.tables.limits.max_batch
        patience = max(1, most // 4)
        left: list[Job] = []
        starved: list[Job] = []
        line = self.waiting
        if self._claimant is not None:
            line.remove(self._claimant)
            line.appendleft(self._claimant)
        while line and self.running < most and len(left) < 4 * most:
            job = line.popleft()
            claimant = self._claimant
            barred = claimant is not None and claimant is not job
            if barred and claimant is not None and job.adapter != claimant.adapter:
                left.append(job)
                continue
            slot = self.slots.get(job.adapter)
            if slot is not None:
                self.slots.move_to_end(job.adapter)
            elif not starved and self.begin(now, job.adapter):
                slot = self.slots[job.adapter]
            if slot is None:
                starved.append(job)
                left.append(job)
            elif not slot.ready:
                left.append(job)
            else:
                slot.references += 1
                self.hits += slot.used
                job.load = None if slot.used else slot.load
                slot.used = True
                self._reading.append(job)
                if job is claimant:
                    self._claimant = None
                for other in starved:
                    other.skips += 1
                    if other.skips >= patience and self._claimant is None:
                        self._claimant = other
        line.extendleft(reversed(left))

    def begin(self, now: float, adapter: int) -> bool:
        """Start a load if there is a slot for it."""
        if len(self.slots) >= self.tables.limits.slots and not self._evict():
            return False
        self.slots[adapter] = slot = _Slot(load="load" if adapter in self.host else "first_load")
        self.loads += 1
        self.changed(self.index, adapter, True)
        seconds = self.tables.load if slot.load == "load" else self.tables.first_load
        self._converted(adapter)
        self._loader_free = max(now, self._loader_free) + seconds
        self._loading.append((self._loader_free, adapter))
        return True

    def warm(self, adapter: int) -> None:
        """Have an adapter in a slot as if it had been used just now, without time passing."""
        if adapter in self.slots:
            self.slots.move_to_end(adapter)
            return
        if len(self.slots) >= self.tables.limits.slots:
            self._evict()
        self.slots[adapter] = _Slot(ready=True, used=True)
        self.changed(self.index, adapter, True)
        self._converted(adapter)

    def _converted(self, adapter: int) -> None:
        self.host[adapter] = None
        self.host.move_to_end(adapter)
        if len(self.host) > self.tables.limits.host:
            self.host.popitem(last=False)

    def _evict(self) -> bool:
        for adapter, slot in self.slots.items():
            if slot.ready and slot.used and not slot.references:
                del self.slots[adapter]
                self.changed(self.index, adapter, False)
                return True
        return False

    def _plan(self, now: float) -> None:
        """The next step, or as many as are alike; without any, the next load."""
        growing = len(self._growing)
        tables = self.tables
        if self._reading:
            asked = budget = tables.chunk(growing, len(self._reading))
            for job in self._reading:
                if not budget:
                    break
                tokens = min(job.left, budget)
                job.left -= tokens
                budget -= tokens
                if not job.left:
                    self._chunks.append(job)
            alone = tables.step[max(growing, 1)]
            self._planned, self._each = 1, alone + (asked - budget) * tables.prompt_token
        elif growing:
            self._each = tables.step[growing]
            self._planned = max(1, self._growing[0][0] - self._steps)
            if self._loading and self.waiting:
                done = math.ceil((self._loading[0][0] - now) / self._each - 1e-9)
                self._planned = min(self._planned, max(1, done))
        else:
            if self._loading:
                self._at(self._loading[0][0])
            return
        self._working, self._start = True, now
        self._at(now + self._planned * self._each)

    def held(self) -> Counter[int]:
        """References by adapter, for a check of the books."""
        return Counter({a: s.references for a, s in self.slots.items() if s.references})
