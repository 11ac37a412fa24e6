"""What follows the registry: the engine's pins, and the names of contents in metrics."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from typing import Protocol

from mora_serve.adapters.record import AdapterRecord, Change, Key
from mora_serve.adapters.registry import Registry
from mora_serve.errors import MoraError, ResourceExhausted
from mora_serve.metrics import Metrics

log = logging.getLogger(__name__)


class Pinner(Protocol):
    """What pins need of an engine. Both are safe to call from any thread."""

    def pin(self, digest: str) -> None:
        """Keep an adapter in its slot. Raises ResourceExhausted."""

    def unpin(self, digest: str) -> None:
        """Let it go."""


class Pins:
    """Keeps the pinned versions of pinned adapters on the device, replacements included.

    Those that are only in a store are ``fetching`` first, where the engine is here. Thread-safe.
    """

    def __init__(self, engine: Pinner, registry: Registry, fetching: Executor | None) -> None:
        self._engine = engine
        self._registry = registry
        self._fetching = fetching
        self._lock = threading.Lock()
        self._reserved: Counter[str] = Counter()
        self._pinned: dict[str, set[Key]] = {}  # two names may share a content
        for record in registry.subscribe(self._changed):
            self._put(record)

    @contextlib.contextmanager
    def reserved(self, digest: str) -> Iterator[None]:
        """Pin a content ahead of its record, to learn whether there is room.

        At the end it stays pinned only if a record is pinned by then. Raises ResourceExhausted.
        """
        with self._lock:
            self._engine.pin(digest)
            self._reserved[digest] += 1
        try:
            yield
        finally:
            with self._lock:
                self._reserved[digest] -= 1
                self._let_go(digest)

    def _changed(self, change: Change) -> None:
        before, after = change.before, change.after
        with self._lock:
            if before is not None and before.pinned:
                self._pinned.get(before.digest, set()).discard(before.key)
                self._let_go(before.digest)
            if after is not None:
                self._put(after)

    def _let_go(self, digest: str) -> None:
        """Unpin a content that nobody wants pinned."""
        if self._reserved[digest] or self._pinned.get(digest):
            return
        del self._reserved[digest]
        self._pinned.pop(digest, None)
        self._engine.unpin(digest)

    def _put(self, record: AdapterRecord) -> None:
        if not record.pinned:
            return
        self._pinned.setdefault(record.digest, set()).add(record.key)
        if self._fetching is None or self._registry.here(record.digest):
            self._pin(record)
            return
        with contextlib.suppress(RuntimeError):  # the server is shutting down
            self._fetching.submit(self._fetch_and_pin, record)

    def _fetch_and_pin(self, record: AdapterRecord) -> None:
        with contextlib.suppress(MoraError):  # it is the engine that says so
            self._registry.fetch(record.digest)
        with self._lock:
            if record.key in self._pinned.get(record.digest, ()):
                self._pin(record)

    def _pin(self, record: AdapterRecord) -> None:
        try:
            self._engine.pin(record.digest)
        except ResourceExhausted as e:  # pinned under a configuration with more slots
            log.warning("adapter %s stays unpinned: %s", record.name, e.message)


class Names:
    """The names of registered contents; forgets the series of names that are gone."""

    def __init__(self, registry: Registry, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._keys: dict[str, set[Key]] = {}
        self._uses: dict[str, int] = {}
        for record in registry.subscribe(self._changed):
            self._put(record)

    def of(self, digests: Iterable[str]) -> list[str]:
        """The names of some contents, one for each adapter; sorted."""
        with self._lock:
            return sorted(name for d in set(digests) for _, name in self._keys.get(d, ()))

    def count(self) -> int:
        """Adapters registered."""
        with self._lock:
            return sum(self._uses.values())

    def _changed(self, change: Change) -> None:
        before, after = change.before, change.after
        if before is not None:
            self._remove(before)
        if after is not None:
            self._put(after)
        if before is not None and before.name not in self._uses:
            self._metrics.unregistered(before.name)

    def _put(self, record: AdapterRecord) -> None:
        with self._lock:
            self._keys.setdefault(record.digest, set()).add(record.key)
            self._uses[record.name] = self._uses.get(record.name, 0) + 1
        self._metrics.registered(record.name)

    def _remove(self, record: AdapterRecord) -> None:
        with self._lock:
            keys = self._keys.get(record.digest, set())
            if record.key not in keys:
                return  # it was made for another base, and never put
            keys.remove(record.key)
            if not keys:
                del self._keys[record.digest]
            self._uses[record.name] -= 1
            if not self._uses[record.name]:
                del self._uses[record.name]
