"""Which replica a request goes to: pure policy, without Ray, gRPC or a clock.

``affinity`` sends a mixture where its adapters are resident. A replica that has far more to do than
the others is passed over (spill-over), and where nobody has the adapters the less loaded of two
drawn at random takes them: the power of two choices (Mitzenmacher, 2001). What a router knows is
late, so it counts what it has sent itself (``sent``, ``ended``) between two reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from random import Random
from typing import Generic, Literal, TypeVar

K = TypeVar("K", bound=Hashable)

Routing = Literal["affinity", "power-of-two", "random"]
ROUTINGS: tuple[Routing, ...] = ("affinity", "power-of-two", "random")

# A replica is overloaded above SPILL times the mean load and SLACK requests besides: without
# these, in a fleet that is nearly idle a second request would already be sent to load its adapter
# elsewhere.
SPILL = 1.25
SLACK = 2.0


class Fleet(Generic[K]):
    """The replicas that take requests, by key: what each has to do and has in its slots."""

    def __init__(self, keys: Iterable[K] = ()) -> None:
        self._keys: list[K] = []
        self._loads: dict[K, int] = {}
        self._resident: dict[K, set[str]] = {}
        self._holders: dict[str, dict[K, None]] = {}  # adapter -> replicas, in a fixed order
        self._total = 0
        for key in keys:
            self.report(key, (), 0)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._loads

    @property
    def keys(self) -> Sequence[K]:
        """Every replica."""
        return self._keys

    @property
    def mean_load(self) -> float:
        """Requests a replica; 0 for no replicas."""
        return self._total / len(self._keys) if self._keys else 0.0

    def load(self, key: K) -> int:
        """Requests that run or wait on a replica. KeyError for one that is not there."""
        return self._loads[key]

    def holding(self, adapter: str) -> Collection[K]:
        """The replicas with the adapter in a slot, or on its way into one."""
        return self._holders.get(adapter, {}).keys()

    def report(self, key: K, resident: Iterable[str], load: int) -> None:
        """What a replica says of itself; one that is new joins."""
        before = self._resident.get(key)
        if before is None:
            self._keys.append(key)
            before = self._resident[key] = set()
        now = set(resident)
        for adapter in sorted(before - now):
            self.unloaded(key, adapter)
        for adapter in sorted(now - before):
            self.loaded(key, adapter)
        self._total += load - self._loads.get(key, 0)
        self._loads[key] = load

    def remove(self, key: K) -> None:
        """A replica is gone. KeyError for one that is not there."""
        self._total -= self._loads.pop(key)
        for adapter in tuple(self._resident[key]):
            self.unloaded(key, adapter)
        del self._resident[key]
        self._keys.remove(key)

    def sent(self, key: K) -> None:
        """A request goes to a replica."""
        self._loads[key] += 1
        self._total += 1

    def ended(self, key: K) -> None:
        """A request of a replica is over; one that has said so itself is at 0 already."""
        if self._loads.get(key, 0):
            self._loads[key] -= 1
            self._total -= 1

    def loaded(self, key: K, adapter: str) -> None:
        """An adapter has, or is about to have, a slot of a replica."""
        self._resident[key].add(adapter)
        self._holders.setdefault(adapter, {})[key] = None

    def unloaded(self, key: K, adapter: str) -> None:
        """An adapter has lost its slot."""
        self._resident[key].discard(adapter)
        holders = self._holders.get(adapter, {})
        holders.pop(key, None)
        if not holders:
            self._holders.pop(adapter, None)


def choose(
    fleet: Fleet[K], adapters: Sequence[str], rng: Random, routing: Routing = "affinity"
) -> K:
    """The replica for a request with these adapters, none for the base alone.

    ValueError for an empty fleet.
    """
    if not len(fleet):
        raise ValueError("no replica takes requests")
    if routing == "random":
        return fleet.keys[rng.randrange(len(fleet))]
    if routing == "power-of-two" or not adapters:
        return _less_loaded(fleet, fleet.keys, rng)
    return _affine(fleet, adapters, rng)


def _affine(fleet: Fleet[K], adapters: Sequence[str], rng: Random) -> K:
    best = _holders(fleet, tuple(dict.fromkeys(adapters)))
    if not best:
        return _less_loaded(fleet, fleet.keys, rng)
    holder = _less_loaded(fleet, best, rng)
    if fleet.load(holder) <= SPILL * fleet.mean_load + SLACK:
        return holder
    other = _less_loaded(fleet, fleet.keys, rng)
    return other if fleet.load(other) < fleet.load(holder) else holder


def _holders(fleet: Fleet[K], adapters: Sequence[str]) -> Sequence[K]:
    """The replicas that hold most of the adapters, if any holds one."""
    if len(adapters) == 1:
        return tuple(fleet.holding(adapters[0]))
    held: Counter[K] = Counter()
    for adapter in adapters:
        held.update(fleet.holding(adapter))
    most = max(held.values(), default=0)
    return tuple(key for key, count in held.items() if count == most)


def _less_loaded(fleet: Fleet[K], keys: Sequence[K], rng: Random) -> K:
    """The less loaded of two drawn at random; of equal ones the first drawn."""
    if len(keys) == 1:
        return keys[0]
    one, two = rng.sample(keys, 2)
    return two if fleet.load(two) < fleet.load(one) else one
