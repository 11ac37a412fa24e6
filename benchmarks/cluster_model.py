"""Many modelled replicas behind a routing policy: an event-driven simulation.

The policy is the one that the cluster runs (mora_serve/cluster/policy.py). It sees residency as it
is, or as reported every ``report_seconds``, and beside that what it has sent itself.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.replica_model import Job, Limits, Profile, Replica, Tables
from mora_serve.cluster.policy import Fleet, Routing, choose


def zipf_trace(
    requests: int,
    rate: float,
    adapters: int,
    exponent: float,
    prompt: int,
    output: int,
    seed: int,
) -> list[Job]:
    """Poisson arrivals, ``rate`` a second; adapter i has a share in proportion to 1/(i+1)^exponent.

    Answers are ``output`` tokens.
    """
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate, requests))
    shares = np.cumsum((np.arange(adapters) + 1.0) ** -exponent)
    wanted = np.searchsorted(shares, rng.random(requests) * shares[-1])
    return [
        Job(float(t), int(a), prompt, output)
        for t, a in zip(due, wanted.clip(max=adapters - 1), strict=True)
    ]


class Cluster:
    """Replicas, their router, and the clock."""

    def __init__(
        self,
        replicas: int,
        profile: Profile,
        limits: Limits,
        routing: Routing,
        seed: int = 0,
        report_seconds: float = 0.0,
    ) -> None:
        tables = Tables(profile, limits, seed)
        self.fleet: Fleet[int] = Fleet(range(replicas), limits.slots)
        self.replicas = [Replica(i, tables, self._wake, self._changed) for i in range(replicas)]
        self._routing, self._rng, self._seed = routing, random.Random(seed), seed
        self._report_seconds = report_seconds
        self._events: list[tuple[float, int, Replica, int]] = []
        self._orders = itertools.count()
        self.seconds = 0.0

    def warm(self, trace: Sequence[Job]) -> None:
        """Fill the slots as this traffic leaves them: routed, with loads that take no time.

        A replica counts as loaded by its latest requests, one for each replica.
        """
        latest: list[int] = []
        for i, job in enumerate(trace):
            key = self._choose(job)
            self.replicas[key].warm(job.adapter)
            self.fleet.sent(key)
            latest.append(key)
            if i >= 2 * len(self.replicas):
                self.fleet.ended(latest[i - 2 * len(self.replicas)])
        for key in self.fleet.keys:
            self.fleet.report(key, map(self._name, self.replicas[key].slots), 0)

    def run(self, trace: Sequence[Job]) -> None:
        """Play the requests, in the order in which they are due, to the last answer."""
        events = self._events
        report = self._report_seconds or float("inf")
        now = 0.0
        for job in trace:
            while events and events[0][0] <= job.due:
                now = self._next()
            now = job.due
            while report <= now:
                self._report()
                report += self._report_seconds
            key = self._choose(job)
            if self.replicas[key].arrive(now, job):
                self.fleet.sent(key)
                if self._report_seconds:
                    self.fleet.loaded(key, self._name(job.adapter))
        while events:
            now = self._next()
        self.seconds = now

    def _name(self, adapter: int) -> str:
        """By which its home is found: a real one's digest is another one each time, too."""
        return f"{self._seed}/{adapter}"

    def _choose(self, job: Job) -> int:
        return choose(self.fleet, (self._name(job.adapter),), self._rng, self._routing)

    def _next(self) -> float:
        now, _, replica, version = heapq.heappop(self._events)
        for _ in replica.boundary(now, version):
            self.fleet.ended(replica.index)
        return now

    def _wake(self, time: float, replica: Replica, version: int) -> None:
        heapq.heappush(self._events, (time, next(self._orders), replica, version))

    def _changed(self, index: int, adapter: int, resident: bool) -> None:
        if self._report_seconds:
            return
        if resident:
            self.fleet.loaded(index, self._name(adapter))
        else:
            self.fleet.unloaded(index, self._name(adapter))

    def _report(self) -> None:
        for replica in self.replicas:
            ready = [self._name(a) for a, slot in replica.slots.items() if slot.ready]
            self.fleet.report(replica.index, ready, self.fleet.load(replica.index))

    def figures(self, trace: Sequence[Job]) -> dict[str, Any]:
        """Hit rate, first token in milliseconds, and cost: replica-seconds at work a 1,000 answers.

        ``load`` is the most loaded replica's requests over the mean's.
        """
        answered = [job for job in trace if not job.refused]
        firsts = np.array([job.first_token - job.due for job in answered]) * 1e3
        loads = sum(r.loads for r in self.replicas)
        hits = sum(r.hits for r in self.replicas)
        served = [r.served for r in self.replicas]
        p50, p95 = np.percentile(firsts, (50, 95)).tolist() if answered else (0.0, 0.0)
        return {
            "hit_rate": hits / max(1, hits + loads),
            "first_token_p50_ms": p50,
            "first_token_p95_ms": p95,
            "busy_seconds_per_1000": sum(r.busy_seconds for r in self.replicas)
            / max(1, len(answered))
            * 1e3,
            "load": max(served) / max(1e-9, sum(served) / len(served)),
            "tokens_a_second": sum(job.output for job in answered) / max(1e-9, self.seconds),
            "refused": len(trace) - len(answered),
            "seconds": self.seconds,
        }


def simulate(
    replicas: int,
    adapters: int,
    routing: Routing,
    profile: Profile,
    limits: Limits,
    *,
    rate: float,
    requests: int,
    warm: int,
    exponent: float = 1.0,
    prompt: int = 64,
    output: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """One point of the grid, from slots as the same traffic has left them."""
    cluster = Cluster(replicas, profile, limits, routing, seed)
    cluster.warm(zipf_trace(warm, rate, adapters, exponent, prompt, output, seed + 1))
    trace = zipf_trace(requests, rate, adapters, exponent, prompt, output, seed)
    cluster.run(trace)
    return {
        "replicas": replicas,
        "adapters": adapters,
        "routing": routing,
        **cluster.figures(trace),
    }
