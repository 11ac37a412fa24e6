"""Which replica a mixture is sent to: where its adapters are, unless too much waits there.

Each adapter has a home among the replicas, by rendezvous hashing (Thaler and Ravishankar, 1998):
the one with the highest hash of both names. All gateways agree on it without a word, and a replica
that comes or goes moves the adapters of its own share alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

SLACK = 2.0  # requests above the mean that nobody is sent away for: a few are no load


@dataclass(frozen=True, slots=True)
class Standing:
    """A replica as a gateway sees it: ``queue`` requests at work, ``free`` slots, others' digests.

    Slots are those of the last report, a second ago or so.
    """

    name: str
    queue: float
    resident: Collection[str]
    free: int = 0


def rank(wanted: Sequence[str], replicas: Sequence[Standing], spill: float) -> list[int]:
    """The replicas by index, the best first, for a mixture of the digests ``wanted``.

    First those whose queue is at most ``spill`` times the mean and SLACK; among these the ones
    with most of the adapters in slots, then those with a slot free for the others, then those at
    home to most of them, then by the hash.
    """
    if not replicas:
        return []
    limit = spill * sum(r.queue for r in replicas) / len(replicas) + SLACK
    scores = {d: [score(d, r.name) for r in replicas] for d in wanted}
    best = {d: max(row) for d, row in scores.items()}

    def key(i: int) -> tuple[bool, int, bool, int, int]:
        replica = replicas[i]
        resident = sum(d in replica.resident for d in wanted)
        crowded = len(wanted) - resident > replica.free
        home = sum(scores[d][i] == best[d] for d in wanted)
        hashed = sum(row[i] for row in scores.values())
        return (replica.queue > limit, -resident, crowded, -home, -hashed)

    return sorted(range(len(replicas)), key=key)


def score(digest: str, replica: str) -> int:
    """The hash by which an adapter chooses its home; 64 bits."""
    data = f"{digest}\0{replica}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
