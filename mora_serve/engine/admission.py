"""Who may join the line: by its length, by the tenant's part of it, by the caller's deadline.

A request that cannot be served in time is refused at once, and the caller learns when to come back;
it would only take the time of others and die in the line. The books are kept by submitting threads
and the engine's own, each entry in constant time, but for the tenants ahead: those are counted by
how many wait, not one by one.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from mora_serve.config import EngineConfig
from mora_serve.core import Request
from mora_serve.engine.forecast import Expected, Forecast, Load
from mora_serve.engine.margin import Margins
from mora_serve.errors import Failure, ResourceExhausted
from mora_serve.places import most, retry_after

HOPE = 0.8  # who waits is let go when even so much of the expected service no longer fits
DRAINED = 0.25  # of a full line, when those who found it full come back


@dataclass(slots=True)
class _Open:
    """A request that has not ended: what it may still need when it starts."""

    tenant: str
    prompt: int
    output: int
    deadline: float | None
    joined: float
    wait: float  # foretold, uncorrected
    end: float  # foretold, in seconds from joining the line; 0: nothing was foretold
    started: bool = False


class Admission:
    """Admits requests to the line and knows what all that have not ended still need.

    Thread-safe. No method waits for anything but another of these methods.
    """

    def __init__(self, limits: EngineConfig, rng: random.Random | None = None) -> None:
        self._limits = limits
        self._rng = rng or random.Random()
        self._lock = threading.Lock()
        self._forecast = Forecast()
        self._margins = Margins()
        self._open: dict[str, _Open] = {}
        self._tenants: Counter[str] = Counter()  # requests in line
        self._lines: Counter[int] = Counter()  # length of a tenant's line -> tenants
        self._waiting = self._waiting_prompt = self._waiting_output = 0
        self._running = self._running_prompt = self._running_output = 0
        self._short = False  # of pages: who waits has found none

    @property
    def waiting(self) -> int:
        """Requests in line that have never run."""
        return self._waiting

    def check(self, tenant: str, prompt: int, output: int, left: float | None) -> None:
        """Raise what ``admit`` would, before anything is done for a request.

        ``prompt`` is how many tokens it has at least; its deadline is ``left`` seconds away.
        """
        with self._lock:
            self._check(tenant, prompt, output, left)

    def admit(self, request: Request, output: int, now: float) -> None:
        """Let a request join the line; at most ``output`` tokens are made for it.

        Raises ResourceExhausted when the line is full (QUEUE_FULL), when the tenant's part of it
        is (TENANT_QUEUE_FULL), or when the deadline cannot be met (DEADLINE_UNREACHABLE).
        """
        prompt, tenant, deadline = len(request.prompt), request.tenant, request.deadline
        with self._lock:
            self._check(tenant, prompt, output, None if deadline is None else deadline - now)
            load = self._load(tenant)
            wait = self._forecast.uncorrected(prompt, output, load)
            foretold = wait and self._forecast.settled
            end = self._forecast.expected(prompt, output, load).end if foretold else 0.0
            self._open[request.id] = _Open(tenant, prompt, output, deadline, now, wait, end)
            self._join(tenant, 1)
            self._waiting += 1
            self._waiting_prompt += prompt
            self._waiting_output += output

    def started(self, request_id: str, cached: int, now: float) -> None:
        """A request got a place for the first time, with so much of its prompt in the cache."""
        with self._lock:
            if (entry := self._open.get(request_id)) is None or entry.started:
                return
            self._leave_line(entry)
            entry.started = True
            self._running += 1
            self._running_prompt += entry.prompt - cached
            self._running_output += entry.output
            entry.prompt -= cached
            self._forecast.started(entry.prompt + cached, cached)
            self._forecast.waited(entry.wait, now - entry.joined)

    def stepped(
        self, decodes: int, prompt_tokens: int, made: int, seconds: float, *, short: bool
    ) -> None:
        """A step took ``seconds``: its answers, its prompt tokens, the tokens that it made.

        ``short``: the next in line found too few pages.
        """
        with self._lock:
            self._forecast.stepped(decodes, prompt_tokens, seconds)
            # What preemption repeats is in no entry: the books never say less than nothing.
            self._running_prompt = max(0, self._running_prompt - prompt_tokens)
            self._running_output = max(0, self._running_output - made)
            self._short = short

    def ended(self, request_id: str, made: int, now: float, *, by_itself: bool) -> None:
        """A request is over, in line or at work; unknown ids are ignored."""
        with self._lock:
            if (entry := self._open.pop(request_id, None)) is None:
                return
            if entry.end and by_itself:
                self._margins.learning(entry.tenant).ended(entry.end, now - entry.joined)
            elif entry.end and entry.deadline is not None and entry.deadline <= now:
                self._margins.learning(entry.tenant).missed()
            if not entry.started:
                self._leave_line(entry)
                return
            self._running -= 1
            self._running_output = max(0, self._running_output - max(0, entry.output - made))
            if not self._running:
                self._running_prompt = self._running_output = 0
            if by_itself:
                self._forecast.ended(entry.output, made)

    def hopeless(self, requests: Seq[Request], now: float) -> list[tuple[Request, Failure]]:
        """Those of some waiting requests that can no longer end in time, and what to tell them."""
        found = []
        with self._lock:
            if not self._forecast.settled:
                return []
            for request in requests:
                entry = self._open.get(request.id)
                if entry is None or entry.started or entry.deadline is None:
                    continue
                service = self._forecast.service(entry.prompt, entry.output)
                left = entry.deadline - now
                if HOPE * service > left:
                    after = retry_after(self._expected(entry.tenant, 0, 0).place, self._rng)
                    found.append((request, _late(left, service, after)))
                    self._margins.learning(entry.tenant).missed()
        return found

    def expected(self, tenant: str, prompt: int, output: int) -> Expected:
        """What a new request of a tenant would have to expect."""
        with self._lock:
            return self._expected(tenant, prompt, output)

    def retry_after(self, tenant: str) -> float:
        """When a tenant who is refused for want of room may try again, in seconds."""
        with self._lock:
            return self._retry_after(DRAINED * self._expected(tenant, 0, 0).place)

    def _check(self, tenant: str, prompt: int, output: int, left: float | None) -> None:
        self._check_line(tenant, prompt, output)
        if left is not None:
            self._check_deadline(tenant, prompt, output, left)

    def _check_line(self, tenant: str, prompt: int, output: int) -> None:
        limits, own = self._limits, self._tenants[tenant]
        full = self._waiting >= limits.max_queue
        if not full and own < most(limits.max_queue, self._waiting - own, limits.tenant_queue):
            return
        expected = self._expected(tenant, prompt, output)
        wait = f"; the wait is about {expected.place:.1f} s" if self._forecast.known else ""
        if full:
            text = f"it holds {self._waiting} requests, as many as engine.max_queue allows"
            reason = "QUEUE_FULL"
        else:
            text = f"{own} requests of this tenant wait, as many as engine.tenant_queue allows"
            reason = "TENANT_QUEUE_FULL"
        raise ResourceExhausted(
            f"queue: {text}{wait}; retry later",
            reason=reason,
            retry_after=self._retry_after(DRAINED * expected.place),
        )

    def _check_deadline(self, tenant: str, prompt: int, output: int, left: float) -> None:
        """Only who has to wait is refused: who can start at once may be lucky."""
        if not self._forecast.settled:
            return
        expected = self._expected(tenant, prompt, output)
        if not expected.place or self._margins.value(tenant) * expected.end <= left:
            return
        raise ResourceExhausted(
            f"deadline: it is {max(0.0, left):.1f} s away, but the wait is about "
            f"{expected.place:.1f} s and the answer takes about "
            f"{expected.end - expected.place:.1f} s; retry later, allow more time or lower "
            "max_tokens",
            reason="DEADLINE_UNREACHABLE",
            retry_after=self._retry_after(expected.place),
        )

    def _expected(self, tenant: str, prompt: int, output: int) -> Expected:
        return self._forecast.expected(prompt, output, self._load(tenant))

    def _load(self, tenant: str) -> Load:
        own = self._tenants[tenant]
        # The least served tenant is next: no other has more turns before it than itself.
        ahead = sum(min(length, own + 1) * n for length, n in self._lines.items())
        return Load(
            places=max(1, self._running) if self._short else self._limits.max_batch,
            running=self._running,
            running_prompt=self._running_prompt,
            running_output=self._running_output,
            waiting=self._waiting,
            waiting_prompt=self._waiting_prompt,
            waiting_output=self._waiting_output,
            ahead=ahead,
        )

    def _retry_after(self, wait: float) -> float:
        return retry_after(wait if self._forecast.known else None, self._rng)

    def _leave_line(self, entry: _Open) -> None:
        self._join(entry.tenant, -1)
        self._waiting -= 1
        self._waiting_prompt -= entry.prompt
        self._waiting_output -= entry.output

    def _join(self, tenant: str, change: int) -> None:
        """Add to the length of a tenant's line, or take away."""
        before = self._tenants[tenant]
        after = before + change
        for length, n in ((before, -1), (after, 1)):
            if length:
                self._lines[length] += n
                if not self._lines[length]:
                    del self._lines[length]
        self._tenants[tenant] = after
        if not after:
            del self._tenants[tenant]


def _late(left: float, service: float, after: float) -> Failure:
    return Failure(
        "RESOURCE_EXHAUSTED",
        "DEADLINE_UNREACHABLE",
        f"deadline: it is {max(0.0, left):.1f} s away and the request still waits, but the answer "
        f"takes about {service:.1f} s; retry later, allow more time or lower max_tokens",
        retry_after=after,
    )
