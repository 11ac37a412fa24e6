"""The engine's books, looked at between two steps: pages, slots, references, lists of requests.

A contradiction is a bug, and a page that two requests believe to be theirs shows one what the
other asked. So nothing runs on inconsistent books. While nobody runs or waits, every page and slot
is free by definition, and the books are begun anew, without what the prefix cache held. While
requests run, there is no telling whose page is whose: the engine ends, and with it the process.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection

from mora_serve.engine.adapter_pool import AdapterPool
from mora_serve.engine.kv_cache import IntegrityError, KVCache
from mora_serve.engine.scheduler import Scheduler
from mora_serve.engine.sequence import Sequence

log = logging.getLogger(__name__)

IDLE_SECONDS = 2.0  # at least, between two looks at the books of an idle engine
BUSY_SECONDS = 60.0  # while requests run or wait


def check(
    sequences: Collection[Sequence], cache: KVCache, scheduler: Scheduler, pool: AdapterPool
) -> None:
    """Raise IntegrityError where the books disagree; ``sequences`` are all requests there are."""
    running, waiting = scheduler.running, scheduler.waiting
    places = Counter([*running, *waiting])
    if places != Counter(sequences):
        odd = [s.request.id for s, n in (places - Counter(sequences)).items() for _ in range(n)]
        lost = [s.request.id for s in sequences if s not in places]
        raise IntegrityError(f"requests listed too often: {odd}; in no list: {lost}")
    scheduler.check_integrity()
    pool.check_integrity(Counter(digest for s in running for digest in s.digests))
    if not sequences and cache.used:
        raise IntegrityError(f"{cache.used} pages are in use by nobody")


class Integrity:
    """Decides when to look, and what to do about what is found."""

    def __init__(self, cache: KVCache, scheduler: Scheduler, pool: AdapterPool) -> None:
        self.checks = self.violations = 0
        self._cache, self._scheduler, self._pool = cache, scheduler, pool
        self._last = time.monotonic()
        self._changed = False

    def change(self) -> None:
        """A request has ended since: an idle engine has something to look at."""
        self._changed = True

    def seconds_left(self) -> float | None:
        """Until an idle engine looks next; None where nothing has changed since it last did."""
        if not self._changed:
            return None
        return max(0.0, self._last + IDLE_SECONDS - time.monotonic())

    def look(self, sequences: Collection[Sequence]) -> bool:
        """Check if it is time to; whether it was.

        Raises IntegrityError when requests are there, or when the books cannot be begun anew.
        """
        now = time.monotonic()
        due = self._last + (BUSY_SECONDS if sequences else IDLE_SECONDS)
        if now < due or not (sequences or self._changed):
            return False
        self._last, self._changed = now, False
        self.checks += 1
        try:
            check(sequences, self._cache, self._scheduler, self._pool)
        except IntegrityError:
            self.violations += 1
            if sequences:
                raise
            log.exception("the engine's books disagree; it is idle, and they are begun anew")
            self._scheduler.reset()
            self._cache.reset()
            self._pool.reset_references()
            check(sequences, self._cache, self._scheduler, self._pool)
        return True
