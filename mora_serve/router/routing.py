"""The router at work: its keys follow the registry, and it is replaced between two decisions."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.contents import router_digest
from mora_serve.adapters.record import AdapterRecord, Change, Key
from mora_serve.adapters.registry import Registry
from mora_serve.errors import MoraError, Unavailable
from mora_serve.router.arrays import Floats
from mora_serve.router.decide import Choice, decide
from mora_serve.router.evidence import gather
from mora_serve.router.features import PooledHidden
from mora_serve.router.index import Index
from mora_serve.router.key_map import KeyMap, draw
from mora_serve.router.keys import TOGETHER, entries, entry_of, needed
from mora_serve.router.router import Router
from mora_serve.router.rows import Entry, Rows
from mora_serve.router.states import Asked, State, States

log = logging.getLogger(__name__)

ROUTER_FILE = "router.safetensors"
AGAIN_SECONDS = 2.0  # until a stored router that a store did not give is asked for again
ROUNDS = 8  # of keys ahead of a router's turn, each for what changed in the one before


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
    """A router and keys made ahead of its turn, each with the card that it was made from.

    Keys are in 8 bits, as the index wants them: there may be thousands. ``late`` gets the keys
    that are still to come once the router is in use. ``content`` is the digest under which the
    registry stores it.
    """

    router: Router
    content: str
    rows: Mapping[Key, tuple[RoutingCard, Rows | None]]
    late: list[Future[None]] = field(default_factory=list)


def _running() -> Future[None]:
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()  # several may wait for it: none can cancel it
    return future


@dataclass(frozen=True, eq=False)
class _Expected:
    """An adapter that is to get a key; ``done`` ends when it has one, or none is wanted."""

    record: AdapterRecord
    done: Future[None] = field(default_factory=_running)


class Routing:
    """Routes prompts among the registered adapters that this base can serve.

    The registry's stored router is taken in at once. One that another process stores later is
    keyed by a thread of its own, as no change of the registry may wait for that. Any thread may
    call any method; decisions read one immutable snapshot and never lock.

    With a router on n-grams an adapter can be routed to when its registration returns. Keys of a
    router on hidden states need the base (``states``); they too are made by a thread of their
    own, and ``expected`` tells whether an adapter's is still to come. Until then the adapter
    keeps the key that it had.
    """

    def __init__(self, registry: Registry, fingerprint: str, states: States | None = None) -> None:
        self._registry = registry
        self._fingerprint = fingerprint
        self._states = states
        self._loading = threading.Lock()
        self._lock = threading.Lock()  # for what follows
        self._snapshot: Snapshot | None = None
        self._prepared: _Prepared | None = None
        self._replaced = 0  # the revision that brought the newest router
        self._expected: dict[Key, _Expected] = {}
        self._working = self._closed = False
        self._closing = threading.Event()
        self._workers = ThreadPoolExecutor(1, thread_name_prefix="keys")
        # Two, so that a newer router does not wait for the keys of one that it replaces.
        self._takers = ThreadPoolExecutor(2, thread_name_prefix="router")
        registry.subscribe(self._changed)
        self._take_stored()

    def close(self) -> None:
        """Make no more keys; whoever expects one gets Unavailable."""
        with self._lock:
            self._closed = True
            self._closing.set()
            for expected in self._expected.values():
                if not expected.done.done():
                    expected.done.set_exception(Unavailable("the server is shutting down"))
            self._expected.clear()
        for workers in (self._workers, self._takers):
            workers.shutdown(wait=False, cancel_futures=True)

    @property
    def snapshot(self) -> Snapshot | None:
        """The router in use with its keys, or None."""
        return self._snapshot

    @property
    def hidden(self) -> PooledHidden | None:
        """The hidden state that the router in use needs of a prompt, or None."""
        snapshot = self._snapshot
        return None if snapshot is None else snapshot.router.hidden

    def load(self, data: bytes) -> Router:
        """Put a router's file in the place of the one in use, and store it.

        The one in use itself keeps its keys; those that could not be made are tried again.

        All adapters get new keys from their stored prompts, at less than a millisecond a
        prompt, or at the base's pace for a router on hidden states; until all are there the old
        router decides. The key of an adapter that changes at that very moment follows; this
        waits for it, but what keeps it away is logged and does not undo the change of routers.

        Raises InvalidArgument for a file that is not sound, FailedPrecondition for a router that
        was fitted for another base, and what ``States.submit`` raises; the router in use then
        stays.
        """
        with self._loading:
            if (present := self._in_use(data)) is not None:
                self._registry.set_router({ROUTER_FILE: data})
                if self._in_use(data) is present:
                    wait(self._expect_again())
                    return present
            router = self._open(data)
            prepared = self._prepared = self._prepare(router, data)
            replaced = self._replaced
            try:
                self._registry.set_router({ROUTER_FILE: data})
            finally:
                self._prepared = None
            if self._replaced == replaced:  # it was stored, if perhaps not in use
                self._put_in_use(prepared, replaced)
        wait(prepared.late)
        return router

    def ask(self, text: str, tenant: str = "") -> Asked | None:
        """Ask the base for the state that ``route`` needs of a tenant's text; None where of none.

        Raises what ``States.submit`` raises.
        """
        hidden = self.hidden
        if hidden is None:
            return None
        return Asked(text, hidden, needed(self._states).submit([text], hidden, tenant=tenant))

    def states(self, texts: Sequence[str]) -> list[State | None]:
        """What ``route`` needs of texts that nobody waits to have routed, as ``state``.

        One question to the base, in the background; this waits for it. None for each text where
        the router in use needs no state. Raises what ``States.submit`` raises.
        """
        hidden = self.hidden
        if hidden is None:
            return [None] * len(texts)
        pooled = needed(self._states).submit(texts, hidden, background=True).result()
        return [State(text, hidden, of) for text, of in zip(texts, pooled, strict=True)]

    def route(
        self,
        tenant: str,
        text: str,
        names: Collection[str] | None,
        max_adapters: int,
        state: State | None = None,
    ) -> Routed:
        """Pick adapters that the tenant may use for a text, among ``names`` where given.

        Without a router, and for a text that none of them fits, nothing is picked. ``state`` is
        what ``ask`` gave. Where the router in use needs another one, being new, this waits for
        the base, and raises what ``States.submit`` raises.
        """
        snapshot = self._snapshot
        if snapshot is None:
            return Routed(Choice((), ()), "")
        router = snapshot.router
        if state is not None and (state.text, state.hidden) == (text, router.hidden):
            pooled: Floats | None = state.pooled
        else:
            pooled = self._pooled(router, tenant, text)
        hidden = self._registry.own(tenant).keys()
        seen = gather(router, snapshot.index, tenant, text, pooled, names, hidden)
        return Routed(decide(seen, router.calibration, max_adapters), router.digest)

    def key_map(self, tenant: str, text: str = "") -> KeyMap | None:
        """The keys that a tenant's prompts are compared with, as points, and where a text lies.

        None without a router. May wait for the base, and raises what ``States.submit`` raises.
        """
        snapshot = self._snapshot
        if snapshot is None:
            return None
        router, z = snapshot.router, None
        if text:
            z = router.embed(text, self._pooled(router, tenant, text))
        return draw(snapshot.index, tenant, router.dims, z, self._registry.own(tenant).keys())

    def _pooled(self, router: Router, tenant: str, text: str) -> Floats | None:
        """The state of a text, where the router needs one."""
        if router.hidden is None:
            return None
        asked = needed(self._states).submit([text], router.hidden, tenant=tenant)
        pooled: Floats = asked.result()[0]
        return pooled

    def listed(self, tenant: str) -> int:
        """How many adapters the router can pick unasked, of those that the tenant may use."""
        snapshot = self._snapshot
        return snapshot.index.listed(tenant, self._registry.own(tenant).keys()) if snapshot else 0

    def expected(self, key: Key) -> Future[None] | None:
        """Ends when the adapter's key is there, or no longer wanted; None where none is to come.

        Ask again then: something may have changed meanwhile. It fails with what
        ``States.submit`` raises; the adapter then keeps the key that it had, and whoever asks
        again has it tried again.
        """
        if not self._expected:  # as with any router on n-grams: the caller need not wait
            return None
        with self._lock:
            expected = self._expected.get(key)
            if expected is not None and expected.done.done():
                self._expect(expected.record)
                expected = self._expected.get(key)
            return None if expected is None else expected.done

    # Routers

    def _open(self, data: bytes) -> Router:
        router = Router.load(data, self._fingerprint)
        if router.hidden is not None:
            needed(self._states).check(router.hidden)
        return router

    def _prepare(self, router: Router, data: bytes) -> _Prepared:
        """With keys of all adapters, those included whose cards change meanwhile.

        Where cards never stop changing, the last ones' keys are late.
        """
        made: dict[Key, tuple[RoutingCard, Rows | None]] = {}
        for _ in range(ROUNDS):
            late = [r for r in self._registry.all() if made.get(r.key, (None,))[0] != r.card]
            if not late:
                break
            for record, entry in entries(router, late, self._states):
                made[record.key] = (record.card, entry and Rows.of([entry]))
        return _Prepared(router, router_digest({ROUTER_FILE: data}), made)

    def _take_stored(self, *, patient: bool = False) -> None:
        """Put the stored router in use.

        One that cannot be used, or is gone as a newer one has come, is logged and left alone. A
        shared store may not give it now: it is asked again, by a thread that is ``patient``.
        """
        replaced, told = self._replaced, False
        try:
            while True:
                try:
                    data = (self._registry.router() or {}).get(ROUTER_FILE)
                    break
                except Unavailable as e:
                    if not told:
                        log.warning("the stored router is not there yet: %s", e.message)
                    told = True
                if not patient:
                    self._take_later()
                    return
                if self._closing.wait(AGAIN_SECONDS) or self._replaced != replaced:
                    return
            if data is not None and self._in_use(data) is None:
                self._put_in_use(self._prepare(self._open(data), data), replaced)
        except MoraError as e:
            log.warning("the stored router cannot be used: %s", e.message)

    def _take_later(self) -> None:
        """Have the stored router put in use: reading it, and its keys, may take long."""
        with self._lock:
            if not self._closed:
                self._takers.submit(self._follow)

    def _follow(self, prepared: _Prepared | None = None) -> None:
        """Put a router in use, or the stored one, on a thread that nothing may end."""
        try:
            if prepared is not None:
                self._put_in_use(prepared, self._replaced)
            else:
                self._take_stored(patient=True)
        except Exception:
            log.exception("the stored router cannot be used")

    def _in_use(self, data: bytes) -> Router | None:
        """The router of a file, if it is the one in use."""
        snapshot = self._snapshot
        if snapshot is None or snapshot.router.digest != _digest(data):
            return None
        return snapshot.router

    def _put_in_use(self, prepared: _Prepared, replaced: int) -> None:
        """With keys for exactly the records that there are, unless there is a newer router.

        Prepared keys count where the card is the same still; others follow.
        """
        router = prepared.router
        while True:
            revision = self._registry.revision
            made: list[tuple[str, Rows]] = []
            late: list[AdapterRecord] = []
            for record in self._registry.all():
                card, row = prepared.rows.get(record.key, (None, None))
                if card != record.card and router.hidden is not None:
                    late.append(record)
                    continue
                if card != record.card:
                    entry = entry_of(router, record)
                    row = entry and Rows.of([entry])
                if row is not None:
                    made.append((record.tenant, row))
            index = Index.of_rows(made)
            with self._lock:
                if self._replaced != replaced:
                    return
                if self._registry.revision != revision:
                    continue
                self._snapshot = Snapshot(router, index)
                for key in list(self._expected):
                    self._settle(key)
                prepared.late.extend(self._expect_all(late))
                return

    # Keys

    def _changed(self, change: Change) -> None:
        if change.router is not None:
            with self._lock:  # so that one put in use right now is seen below, or stopped
                self._replaced = change.revision
            prepared = self._prepared
            if prepared is not None and prepared.content == change.router.digest:
                self._follow(prepared)
            else:
                self._take_later()
            return
        with self._lock:
            snapshot, before, after = self._snapshot, change.before, change.after
            if snapshot is None or (before and after and before.card == after.card):
                return
            if after is not None and not self._fits(after):
                after = None
            if before is not None:
                self._settle(before.key)
            if after is not None and snapshot.router.hidden is not None:
                self._expect(after)
                return
            index = snapshot.index
            if before is not None:
                index = index.remove(*before.key)
            if after is not None:
                entry = entry_of(snapshot.router, after)
                if entry is not None:
                    index = index.put(after.tenant, entry)
            self._snapshot = Snapshot(snapshot.router, index)

    def _expect(self, record: AdapterRecord) -> None:
        """Have an adapter's key made; with the lock held."""
        self._settle(record.key)  # a new router may have seen a change before it is made known
        if self._closed:
            return
        self._expected[record.key] = _Expected(record)
        if not self._working:
            self._working = True
            self._workers.submit(self._make_keys)

    def _expect_all(self, records: Collection[AdapterRecord]) -> list[Future[None]]:
        """Have the keys of some adapters made, and when they are; with the lock held."""
        for record in records:
            self._expect(record)
        expected = (self._expected.get(record.key) for record in records)
        return [e.done for e in expected if e is not None]

    def _expect_again(self) -> list[Future[None]]:
        """Have those keys made that failed, and when they are."""
        with self._lock:
            failed = [e.record for e in self._expected.values() if e.done.done()]
            return self._expect_all(failed)

    def _settle(self, key: Key) -> None:
        """Expect an adapter's key no longer; with the lock held."""
        expected = self._expected.pop(key, None)
        if expected is not None and not expected.done.done():
            expected.done.set_result(None)

    def _make_keys(self) -> None:
        """Make the keys that are expected, until none is."""
        while True:
            with self._lock:
                snapshot = self._snapshot
                batch = [e for e in self._expected.values() if not e.done.done()][:TOGETHER]
                if snapshot is None or not batch:
                    self._working = False
                    return
            made: list[tuple[AdapterRecord, Entry | None]] = []
            error: Exception | None = None
            try:
                made = list(entries(snapshot.router, [e.record for e in batch], self._states))
            except Exception as e:  # whatever it is: somebody waits for each of them
                log.warning("%d adapters have no key: %s", len(batch), e)
                error = e
            with self._lock:
                newest = self._snapshot
                if newest is None or newest.router is not snapshot.router:
                    continue
                index = newest.index
                batch = [e for e in batch if self._expected.get(e.record.key) is e]
                wanted = {e.record.key for e in batch}
                for record, entry in made:
                    if record.key in wanted and entry is not None:
                        index = index.put(record.tenant, entry)
                    elif record.key in wanted:
                        index = index.remove(*record.key)
                self._snapshot = Snapshot(snapshot.router, index)
                for expected in batch:
                    if error is None:
                        self._settle(expected.record.key)
                    else:
                        expected.done.set_exception(error)

    def _fits(self, record: AdapterRecord) -> bool:
        return not self._fingerprint or record.card.base_fingerprint in ("", self._fingerprint)


def _digest(data: bytes) -> str:
    """Of a router's file, as ``Router.digest``."""
    return hashlib.sha256(data).hexdigest()
