"""Open-loop load: requests are sent when they are due, whether earlier ones have answers or not.

Latencies count from the time at which a request was due, not from when it was sent: a client or a
server that falls behind shows (no "coordinated omission").

    due = poisson(rate=5.0, seconds=30.0, rng=random.Random(0))
    outcomes = await play(due, ask)          # ask(i) yields the token count of each message
    summary(outcomes)
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mora_serve.client import AsyncClient
from mora_serve.errors import MoraError

Ask = Callable[[int], AsyncIterator[int]]
PERCENTILES = (50, 90, 99)


@dataclass
class Outcome:
    """One request: times in seconds since the start of the load.

    ``messages`` are the times at which messages with tokens came, with the number of tokens in
    each. ``error`` is a gRPC code's name, empty where the answer is whole.
    """

    due: float
    sent: float = 0.0
    ended: float = 0.0
    messages: list[tuple[float, int]] = field(default_factory=list)
    error: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that came."""
        return sum(n for _, n in self.messages)

    @property
    def first_token(self) -> float:
        """Seconds from when it was due to its first token."""
        return self.messages[0][0] - self.due

    @property
    def gaps(self) -> list[float]:
        """Seconds between two messages with tokens: tokens that come together count once."""
        return [b - a for (a, _), (b, _) in itertools.pairwise(self.messages)]


def poisson(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Arrival times in 0..``seconds`` of a Poisson process with ``rate`` arrivals a second."""
    times = []
    now = rng.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += rng.expovariate(rate)
    return times


def popularity(kind: str, count: int, exponent: float = 1.0) -> list[float]:
    """Shares of ``count`` items, most popular first: ``uniform``, or ``zipf``: 1/rank^exponent."""
    if kind not in ("uniform", "zipf"):
        raise ValueError(f"popularity: {kind!r} is unknown; give uniform or zipf")
    weights = [1.0 if kind == "uniform" else (i + 1) ** -exponent for i in range(count)]
    total = sum(weights)
    return [w / total for w in weights]


def draw(
    names: Sequence[str], shares: Sequence[float], size: int, rng: random.Random
) -> tuple[str, ...]:
    """``size`` different names, one after another by their shares among those that are left."""
    left, weights, drawn = list(names), list(shares), []
    for _ in range(size):
        (i,) = rng.choices(range(len(left)), weights)
        drawn.append(left.pop(i))
        weights.pop(i)
    return tuple(drawn)


async def play(due: Sequence[float], ask: Ask) -> list[Outcome]:
    """Send request i at ``due[i]`` seconds from now and wait for all answers.

    ``ask(i)`` yields, message by message, how many tokens came. A MoraError is recorded as the
    request's error; anything else is raised.
    """
    start = time.perf_counter()

    async def one(i: int, outcome: Outcome) -> None:
        outcome.sent = time.perf_counter() - start
        try:
            async for tokens in ask(i):
                if tokens:
                    outcome.messages.append((time.perf_counter() - start, tokens))
        except MoraError as e:
            outcome.error = e.code
        outcome.ended = time.perf_counter() - start

    outcomes = [Outcome(t) for t in due]
    async with asyncio.TaskGroup() as tasks:
        for i in sorted(range(len(due)), key=due.__getitem__):
            await asyncio.sleep(max(0.0, due[i] - (time.perf_counter() - start)))
            tasks.create_task(one(i, outcomes[i]))
    return outcomes


async def streamed(client: AsyncClient, options: Mapping[str, Any]) -> AsyncIterator[int]:
    """Ask for one stream with the client's keyword arguments; the tokens of each message."""
    async with await client.stream(**options) as deltas:
        async for delta in deltas:
            yield len(delta.tokens)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Rates a second and latencies in milliseconds of a load.

    Rates are over the time from the start to the last answer. Latencies are of answered requests;
    ``late_ms`` is how late this client sent what was due: large values say that it, not the server,
    was at its limit.
    """
    answered = [o for o in outcomes if not o.error and o.messages]
    seconds = max((o.ended for o in outcomes), default=0.0)
    return {
        "requests": len(outcomes),
        "answered": len(answered),
        "errors": dict(Counter(o.error or "EMPTY" for o in outcomes if o not in answered)),
        "failed": len(outcomes) - len(answered),
        "seconds": seconds,
        "requests_per_second": len(answered) / seconds if seconds else 0.0,
        "tokens_per_second": sum(o.tokens for o in answered) / seconds if seconds else 0.0,
        "first_token_ms": percentiles([o.first_token for o in answered]),
        "inter_token_ms": percentiles([gap for o in answered for gap in o.gaps]),
        "total_ms": percentiles([o.ended - o.due for o in answered]),
        "late_ms": percentiles([o.sent - o.due for o in outcomes]),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median, p90, p99 and maximum in milliseconds; empty where there is nothing."""
    if not seconds:
        return {}
    values = np.percentile(np.asarray(seconds), (*PERCENTILES, 100)) * 1e3
    return dict(zip((*(f"p{p}" for p in PERCENTILES), "max"), map(float, values), strict=True))
