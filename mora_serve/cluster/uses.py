"""How much adapters are used lately: what a new replica loads before it serves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

HALVED_AFTER = 1000  # uses; older ones count half


class Uses:
    """Counts uses of contents, the newest most."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._since = 0

    def add(self, digests: Iterable[str]) -> None:
        """Count one use of each."""
        for digest in digests:
            self._counts[digest] += 2
            self._since += 1
        if self._since >= HALVED_AFTER:
            self._since = 0
            halves = {d: n // 2 for d, n in self._counts.items()}
            self._counts = Counter({d: n for d, n in halves.items() if n})

    def most(self, count: int) -> list[str]:
        """The digests used most, the most first."""
        return [digest for digest, _ in self._counts.most_common(count)]
