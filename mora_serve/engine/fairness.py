"""Who is next: the least served tenant, within it the least served adapter set, then the oldest.

Virtual token counters as in "Fairness in Serving Large Language Models" (Sheng et al., OSDI
2024): whoever comes back from idle starts level with the least served of those active, so that
nobody saves up a claim to the whole machine and nobody pays for having been alone on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mora_serve.engine.sequence import Sequence

PROMPT_COST = 1.0
OUTPUT_COST = 2.0

K = TypeVar("K", bound=Hashable)


class ServiceCounters(Generic[K]):
    """Service received by each key, and how many requests of it are active."""

    def __init__(self) -> None:
        self._served: dict[K, float] = {}
        self._active: dict[K, int] = {}

    def __getitem__(self, key: K) -> float:
        return self._served.get(key, 0.0)

    def enter(self, key: K) -> None:
        """One more active request of this key."""
        if key not in self._active:
            floor = min((self[k] for k in self._active), default=0.0)
            self._served[key] = max(self[key], floor)
        self._active[key] = self._active.get(key, 0) + 1

    def leave(self, key: K) -> None:
        """One less; when nobody is active any more all accounts are closed."""
        self._active[key] -= 1
        if self._active[key] == 0:
            del self._active[key]
            if not self._active:
                self._served.clear()
            elif len(self._served) > 2 * len(self._active) + 64:
                floor = min(self[k] for k in self._active)
                self._served = {
                    k: v for k, v in self._served.items() if k in self._active or v > floor
                }

    def charge(self, key: K, cost: float) -> None:
        """Account for service given to an active key."""
        self._served[key] += cost

    def __len__(self) -> int:
        return len(self._active)


@dataclass(slots=True)
class _Line:
    """One tenant's: how many have left it, and at how many each adapter set in it is overdue."""

    left: int = 0
    due: dict[tuple[str, ...], int] = field(default_factory=dict)


class FairQueue:
    """Waiting requests by tenant and adapter set, and the service that each has received.

    Less served first would be never for an adapter set in demand while ever new ones arrive. So
    once ``patience`` requests of its tenant have left the line since a request of the set did, or
    since there is one in it, the set is overdue; those go first, in the order in which they became
    so. One that is always in demand thus has 1 of ``patience + 1`` places, or one a round.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._tenants: ServiceCounters[str] = ServiceCounters()
        self._sets: dict[str, ServiceCounters[tuple[str, ...]]] = {}
        self._waiting: dict[tuple[str, tuple[str, ...]], deque[Sequence]] = {}
        self._lines: dict[str, _Line] = {}  # tenant -> its part of the line
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._waiting.values():
            yield from queue

    @property
    def idle(self) -> bool:
        """Nobody waits, nobody is being served."""
        return not self._count and not len(self._tenants) and not self._sets

    def enter(self, sequence: Sequence) -> None:
        """A new request: it is active until ``leave``, running or waiting."""
        tenant = sequence.request.tenant
        self._tenants.enter(tenant)
        self._sets.setdefault(tenant, ServiceCounters()).enter(sequence.digests)
        self._lines.setdefault(tenant, _Line())

    def leave(self, sequence: Sequence) -> None:
        """The request ended."""
        tenant = sequence.request.tenant
        self._tenants.leave(tenant)
        self._sets[tenant].leave(sequence.digests)
        if not len(self._sets[tenant]):
            del self._sets[tenant], self._lines[tenant]

    def charge(self, sequence: Sequence, start: int, end: int) -> None:
        """Account for computing tokens ``start`` to ``end``; what preemption repeats is free."""
        start = max(start, sequence.charged)
        if start >= end:
            return
        sequence.charged = end
        prompt = max(0, min(end, sequence.prompt_length) - start)
        cost = PROMPT_COST * prompt + OUTPUT_COST * (end - start - prompt)
        tenant = sequence.request.tenant
        self._tenants.charge(tenant, cost)
        self._sets[tenant].charge(sequence.digests, cost)

    def served(self, tenant: str) -> float:
        """The service that a tenant has received, as far as it counts against others'."""
        return self._tenants[tenant]

    def rank(self, sequence: Sequence) -> tuple[float, bool, float]:
        """Its place in line: the service of its tenant, then what speaks for its adapter set.

        That is since when it is overdue, else (True) the service that it has received.
        """
        tenant, digests = sequence.request.tenant, sequence.digests
        line = self._lines[tenant]
        due = line.due.get(digests, line.left + 1)
        if due <= line.left:
            return self._tenants[tenant], False, due
        return self._tenants[tenant], True, self._sets[tenant][digests]

    def push(self, sequence: Sequence) -> None:
        """Put in line, by age: what was preempted is older than all that still wait."""
        key = sequence.request.tenant, sequence.digests
        if key not in self._waiting:
            self._waiting[key] = deque()
            self._expect(key)
        queue = self._waiting[key]
        behind: list[Sequence] = []
        while queue and queue[-1].order > sequence.order:
            behind.append(queue.pop())
        queue.append(sequence)
        queue.extend(reversed(behind))
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        """Take out of the line. KeyError or ValueError if it is not in it."""
        key = tenant, digests = sequence.request.tenant, sequence.digests
        queue = self._waiting[key]
        queue.remove(sequence)
        self._count -= 1
        line = self._lines[tenant]
        line.left += 1
        if queue:
            self._expect(key)
        else:
            del self._waiting[key], line.due[digests]

    def _expect(self, key: tuple[str, tuple[str, ...]]) -> None:
        """When the next request of a set is overdue."""
        tenant, digests = key
        line = self._lines[tenant]
        line.due[digests] = line.left + self._patience

    def heads(self) -> list[Sequence]:
        """The first in line of every adapter set of every tenant, in no order."""
        return [queue[0] for queue in self._waiting.values()]

    def head(self, like: Sequence) -> Sequence | None:
        """The first in line with the same tenant and adapter set."""
        queue = self._waiting.get((like.request.tenant, like.digests))
        return queue[0] if queue else None
