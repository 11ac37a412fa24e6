"""Which replica a request goes to: pure policy, without Ray, gRPC or a clock.

``affinity`` sends a mixture where most of its adapters are resident. A replica that has far more to
do than the others is passed over (spill-over); of several that hold as much, the less loaded of two
drawn at random takes the request: the power of two choices (Mitzenmacher, 2001). An adapter that
nobody holds goes to its home, found by rendezvous hashing (Thaler and Ravishankar, 1998): all
gateways agree on it without a word, and a replica that comes or goes moves its own share alone. A
home without a free slot gives way to one that has some. What a router knows is late, so it counts
what it has sent itself (``sent``, ``loaded``, ``ended``) between two reports.

``affinity`` is ``AffinityRouter``'s rule, and the one that benchmarks/cluster_simulator.py plays.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Sequence
from random import Random
from typing import Generic, Literal, TypeVar

import numpy as np

from mora_serve.config import DEFAULT_SPILL

K = TypeVar("K", bound=Hashable)

Routing = Literal["affinity", "power-of-two", "random"]
ROUTINGS: tuple[Routing, ...] = ("affinity", "power-of-two", "random")

# A replica is overloaded above ``spill`` times the mean load and SLACK requests besides: without
# these, in a fleet that is nearly idle a second request would already be sent to load its adapter
# elsewhere.
SLACK = 2.0
REPORT_SECONDS = 1.0  # between two reports of what a replica has in its slots
HOMES = 8  # replicas that an adapter tries as its home, one after the other


class Fleet(Generic[K]):
    """The replicas that take requests, by key: what each has to do and has in its ``slots``.

    A key's ``str`` is what its replica is called, everywhere.
    """

    def __init__(self, keys: Iterable[K] = (), slots: int = 0) -> None:
        self._keys: list[K] = []
        self._hashes = np.zeros(0, np.uint64)  # of the keys
        self._loads: dict[K, int] = {}
        self._slots: dict[K, int] = {}
        self._resident: dict[K, set[str]] = {}
        self._holders: dict[str, dict[K, None]] = {}  # adapter -> replicas, in a fixed order
        self._total = 0
        for key in keys:
            self.report(key, (), 0, slots)

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

    def room(self, key: K) -> int:
        """Slots that are free. KeyError for a replica that is not there."""
        return self._slots[key] - len(self._resident[key])

    def homes(self, adapters: Iterable[str]) -> list[K]:
        """The first HOMES replicas in the order in which these adapters choose a home."""
        scores = sum(_mixed(self._hashes ^ _hash(adapter)) for adapter in adapters)
        return [self._keys[i] for i in np.argsort(scores)[-HOMES:][::-1]]

    def report(self, key: K, resident: Iterable[str], load: int, slots: int | None = None) -> None:
        """What a replica says of itself; one that is new joins. Its ``slots`` stay if not given."""
        before = self._resident.get(key)
        if before is None:
            self._keys.append(key)
            self._hashes = np.append(self._hashes, _hash(str(key)))
            self._loads[key] = self._slots[key] = 0
            before = self._resident[key] = set()
        now = set(resident)
        for adapter in sorted(before - now):
            self.unloaded(key, adapter)
        for adapter in sorted(now - before):
            self.loaded(key, adapter)
        if slots is not None:
            self._slots[key] = slots
        self.queued(key, load)

    def queued(self, key: K, load: int) -> None:
        """So many requests run or wait on a replica. KeyError for one that is not there."""
        self._total += load - self._loads[key]
        self._loads[key] = load

    def remove(self, key: K) -> None:
        """A replica is gone. KeyError for one that is not there."""
        self._total -= self._loads.pop(key)
        for adapter in tuple(self._resident[key]):
            self.unloaded(key, adapter)
        del self._resident[key], self._slots[key]
        self._hashes = np.delete(self._hashes, self._keys.index(key))
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
    fleet: Fleet[K],
    adapters: Sequence[str],
    rng: Random,
    routing: Routing = "affinity",
    spill: float = DEFAULT_SPILL,
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
    return _affine(fleet, tuple(dict.fromkeys(adapters)), rng, spill)


def _affine(fleet: Fleet[K], adapters: Sequence[str], rng: Random, spill: float) -> K:
    limit = spill * fleet.mean_load + SLACK
    holders = _holders(fleet, adapters)
    for keys in holders:
        if able := [key for key in keys if fleet.load(key) <= limit]:
            return _less_loaded(fleet, able, rng)
    able = [key for key in fleet.homes(adapters) if fleet.load(key) <= limit]
    roomy = [key for key in able if fleet.room(key) >= len(adapters)]
    if able:
        return (roomy or able)[0]
    other = _less_loaded(fleet, fleet.keys, rng)
    if holders:
        holder = _less_loaded(fleet, holders[0], rng)
        return other if fleet.load(other) < fleet.load(holder) else holder
    return other


def _holders(fleet: Fleet[K], adapters: Sequence[str]) -> list[Sequence[K]]:
    """The replicas that hold any of the adapters, in groups: first those that hold most."""
    if len(adapters) == 1:
        keys = tuple(fleet.holding(adapters[0]))
        return [keys] if keys else []
    held: Counter[K] = Counter()
    for adapter in adapters:
        held.update(fleet.holding(adapter))
    counts = sorted(set(held.values()), reverse=True)
    return [[key for key, n in held.items() if n == count] for count in counts]


def _less_loaded(fleet: Fleet[K], keys: Sequence[K], rng: Random) -> K:
    """The less loaded of two drawn at random; of equal ones the first drawn."""
    if len(keys) == 1:
        return keys[0]
    one, two = rng.sample(keys, 2)
    return two if fleet.load(two) < fleet.load(one) else one


def _hash(name: str) -> np.uint64:
    """64 bits that depend on nothing but the name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest))


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), as good as independent of the bits that went in (MurmurHash3's end)."""
    mixed = hashes.copy()
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(factor)  # modulo 2^64
    mixed ^= mixed >> np.uint64(33)
    return mixed * 2.0**-64
