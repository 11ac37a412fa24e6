"""The router at work: its keys follow the registry, and it is replaced between two decisions."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mora_serve.adapters.record import AdapterRecord, Change, Key
from mora_serve.adapters.registry import Registry
from mora_serve.errors import MoraError
from mora_serve.router.decide import Choice, decide
from mora_serve.router.index import Entry, Index
from mora_serve.router.router import Router

log = logging.getLogger(__name__)

ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A router with the keys made by it; what one decision sees."""

    router: Router
    index: Index


class Routed(NamedTuple):
    """What the router picked for a prompt, and the digest of the router that did."""

    choice: Choice
    router_digest: str


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A router and keys made ahead of its turn, each with the record that it was made from."""

    router: Router
    entries: Mapping[Key, tuple[AdapterRecord, Entry | None]]


class Routing:
    """Routes prompts among the registered adapters that this base can serve.

    The registry's stored router is taken in at once and whenever it is replaced, by whichever
    process. An adapter can be routed to when its registration returns. Any thread may call any
    method; decisions read one immutable snapshot and never lock.
    """

    def __init__(self, registry: Registry, fingerprint: str) -> None:
        self._registry = registry
        self._fingerprint = fingerprint
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._prepared: _Prepared | None = None
        registry.subscribe(self._changed)
        self._take_stored()

    @property
    def snapshot(self) -> Snapshot | None:
        """The router in use with its keys, or None."""
        return self._snapshot

    def load(self, data: bytes) -> Router:
        """Put a router's file in the place of the one in use, and store it.

        All adapters get new keys from their stored prompts, at less than a millisecond a
        prompt; until all are there the old router decides. Raises InvalidArgument for a file
        that is not sound, FailedPrecondition for a router that was fitted for another base; the
        router in use then stays.
        """
        router = Router.load(data, self._fingerprint)
        entries = {r.key: (r, entry_of(router, r)) for r in self._registry.all()}
        self._prepared = _Prepared(router, entries)
        try:
            self._registry.set_router({ROUTER_FILE: data})
        finally:
            self._prepared = None
        return router

    def route(
        self, tenant: str, text: str, names: Collection[str] | None, max_adapters: int
    ) -> Routed:
        """Pick adapters of the tenant for a text, among ``names`` where given.

        Without a router, and for a text that none of them fits, nothing is picked.
        """
        snapshot = self._snapshot
        if snapshot is None:
            return Routed(Choice((), ()), "")
        scores = snapshot.index.score(tenant, snapshot.router.embed(text), names)
        choice = decide(scores, snapshot.router.calibration, max_adapters)
        return Routed(choice, snapshot.router.digest)

    def _take_stored(self) -> None:
        files = self._registry.router()
        if files is None or ROUTER_FILE not in files:
            return
        data, prepared = files[ROUTER_FILE], self._prepared
        if prepared is None or prepared.router.digest != hashlib.sha256(data).hexdigest():
            try:
                prepared = _Prepared(Router.load(data, self._fingerprint), {})
            except MoraError as e:  # stored under another base: the one in use stays
                log.warning("the stored router cannot be used: %s", e.message)
                return
        while True:
            revision = self._registry.revision
            snapshot = _keyed(prepared, self._registry.all())
            with self._lock:
                if self._registry.revision == revision:
                    self._snapshot = snapshot
                    return

    def _changed(self, change: Change) -> None:
        if change.router is not None:
            self._take_stored()
            return
        with self._lock:
            snapshot, before, after = self._snapshot, change.before, change.after
            if snapshot is None or (before and after and before.card == after.card):
                return
            index = snapshot.index
            if before is not None:
                index = index.remove(*before.key)
            if after is not None and self._fits(after):
                entry = entry_of(snapshot.router, after)
                if entry is not None:
                    index = index.put(after.tenant, entry)
            self._snapshot = Snapshot(snapshot.router, index)

    def _fits(self, record: AdapterRecord) -> bool:
        return not self._fingerprint or record.card.base_fingerprint in ("", self._fingerprint)


def entry_of(router: Router, record: AdapterRecord) -> Entry | None:
    """An adapter's key from its example prompts.

    Without any, from its description; the router then picks it only where it is named. None
    where neither has anything to go by.
    """
    card = record.card
    key = router.key(card.prompts)
    if key is not None:
        return Entry(record.name, key, card.group)
    key = router.key((card.description,))
    return None if key is None else Entry(record.name, key, card.group, listed=False)


def _keyed(prepared: _Prepared, records: Iterable[AdapterRecord]) -> Snapshot:
    """Keys for exactly these records: the prepared ones where the record is the same still."""

    def entry(record: AdapterRecord) -> Entry | None:
        source, entry = prepared.entries.get(record.key, (None, None))
        return entry if source is record else entry_of(prepared.router, record)

    pairs = ((r.tenant, entry(r)) for r in records)
    return Snapshot(prepared.router, Index.of((t, e) for t, e in pairs if e is not None))
