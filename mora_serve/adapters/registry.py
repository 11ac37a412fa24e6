"""The durable, versioned registry of adapters, keyed by (tenant, name).

A directory of content blobs, a log of changes and snapshots, so that a process may be killed at
any moment and several may share it: first the blob, then the change that refers to it, and a
blob without a change is removed. Reads see an immutable state and never wait for the disk.
What the disk has damaged since is set aside when it is found, and the rest is served.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace as replaced
from pathlib import Path
from typing import Self

from mora_serve.adapters import lookup
from mora_serve.adapters.blobs import Buffer
from mora_serve.adapters.card import RoutingCard, check_card
from mora_serve.adapters.contents import Health, router_digest
from mora_serve.adapters.disk import disk_errors
from mora_serve.adapters.files import CONFIG, WEIGHTS
from mora_serve.adapters.history import History
from mora_serve.adapters.offers import Offers
from mora_serve.adapters.record import AdapterRecord, Change, Quota, RouterRecord, State
from mora_serve.adapters.storage import LocalStorage, Storage
from mora_serve.adapters.untrusted import check_name, quoted
from mora_serve.adapters.validate import ValidatedAdapter, read_stored
from mora_serve.config import AdaptersConfig
from mora_serve.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from mora_serve.model.shape import ModelShape

__all__ = ["AdapterRecord", "Change", "Registry", "RouterRecord"]

log = logging.getLogger(__name__)

SNAPSHOT_EVERY = 256  # changes
CHECKED_AT_START = 4 << 30  # bytes whose sums are formed at the start; the others' when used


class Registry:
    """Adapters and the router that survive a restart.

    ``place`` is a directory, or another storage, which is closed with it; None keeps them for this
    object's life. ``shape`` and ``fingerprint`` are the base's. Any thread may call any method.

    Raises ConfigError where the place holds what this version cannot read. Where it is a store that
    others share, every method that changes something, and ``open``, raise Unavailable while that
    does not answer.
    """

    def __init__(
        self,
        place: Path | Storage | None,
        limits: AdaptersConfig,
        shape: ModelShape,
        fingerprint: str = "",
        *,
        snapshot_every: int = SNAPSHOT_EVERY,
    ) -> None:
        self._limits = limits
        self._shape = shape
        self._fingerprint = fingerprint
        self._storage = LocalStorage(place) if place is None or isinstance(place, Path) else place
        self._contents = self._storage.contents
        self._blobs = self._contents.blobs
        self._log = self._storage.log
        self._history = History(self._log, snapshot_every)
        self._offers = Offers(self._history)
        self._reserve = self._storage.reserve
        self._unremoved: set[str] = set()  # blobs that somebody held when they were to go
        self.refresh()
        self._blobs.clean()
        self._check_contents()
        self._reserve.renew()

    def close(self) -> None:
        """Let go of everything; a registry without a directory is gone."""
        self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Reading

    @property
    def _state(self) -> State:
        return self._history.state

    @property
    def revision(self) -> int:
        """Grows with each change."""
        return self._state.revision + self._offers.turns

    @property
    def digests(self) -> frozenset[str]:
        """Contents that are referred to, the router's included."""
        return self._state.digests

    def get(self, tenant: str, name: str, digest: str = "") -> AdapterRecord:
        """What the tenant means by a name, of this content where a digest is given.

        That is its own adapter, or else the shared one of this name.

        Raises NotFound, with the nearest names that the tenant may use, and FailedPrecondition for
        one that was made for another base or is damaged.
        """
        state = self._state
        record = state.find(tenant, name)
        if record is None:
            raise lookup.unknown("adapter", name, (r.name for r in state.visible(tenant)))
        if digest and digest != record.digest:
            raise NotFound(
                f"digest: adapter {quoted(name)} has no version {quoted(digest)}; its version is "
                f"now {record.version} with digest {record.digest}; use that, or give no digest",
                field="digest",
                reason="VERSION_NOT_FOUND",
            )
        if not self._fits(record):
            raise FailedPrecondition(
                f"adapter: {quoted(name)} was trained on base {record.card.base_fingerprint}, this "
                f"server runs {self._fingerprint}; unregister it or start the server with its base",
                field="adapter",
                reason="WRONG_BASE",
            )
        if record.digest not in self._offers and self._contents.again(record.digest):
            self._offers.restore(record.digest)  # another process has; ``open`` looks at it
        if record.digest not in self._offers:
            raise FailedPrecondition(
                f"adapter: {quoted(name)} is damaged on the server's disk; register or upload it "
                "again as it was, or unregister it",
                field="adapter",
                reason="ADAPTER_DAMAGED",
            )
        return record

    def list(self, tenant: str) -> tuple[AdapterRecord, ...]:
        """What the tenant may use, by name, adapters for another base and damaged ones included.

        Its own adapters, and the shared ones whose names it has not given to its own.
        """
        return self._state.visible(tenant)

    def own(self, tenant: str) -> Mapping[str, AdapterRecord]:
        """The tenant's own adapters by name, those for another base and damaged ones included."""
        return self._state.by_tenant.get(tenant, {})

    def served(self, tenant: str) -> tuple[AdapterRecord, ...]:
        """Those that the tenant may use and that can be served, by name."""
        return tuple(filter(self._offered, self.list(tenant)))

    def verified(self, record: AdapterRecord) -> bool:
        """Whether the adapter says that it was trained on this base."""
        return bool(self._fingerprint) and record.card.base_fingerprint == self._fingerprint

    def routable(self, record: AdapterRecord) -> bool:
        """Whether the router can pick the adapter: it can be served, and it has prompts."""
        return record.card.routable and self._offered(record)

    def damaged(self, record: AdapterRecord) -> bool:
        """Whether the adapter's content was found damaged or missing."""
        return record.digest not in self._offers

    def all(self) -> tuple[AdapterRecord, ...]:
        """All tenants' adapters that can be served, by tenant and name."""
        tenants = sorted(self._state.by_tenant.items())
        return tuple(r for _, own in tenants for r in own.values() if self._offered(r))

    def tasks(self, tenant: str) -> tuple[str, ...]:
        """The tasks that ``by_task`` knows for the tenant, in order."""
        return tuple(sorted({t for r in self.served(tenant) for t in r.tasks}))

    def by_task(self, tenant: str, task: str) -> tuple[AdapterRecord, ...]:
        """What the tenant may use for a task, by name: at least one.

        Raises NotFound with the nearest tasks that the tenant may use.
        """
        found = tuple(filter(self._offered, self._state.visible_for(tenant, task)))
        if not found:
            raise lookup.unknown("task", task, self.tasks(tenant))
        return found

    # Content

    def open(self, digest: str) -> ValidatedAdapter:
        """A content, its weights mapped. It has no card; they belong to records.

        Raises NotFound for a digest that is neither registered nor retained, or whose content is
        damaged, and FailedPrecondition for one that this base or these limits cannot serve.
        """
        if not self._whole(digest):
            raise lookup.gone(digest)
        hold = self._blobs.hold(digest)
        if hold is None:
            raise lookup.gone(digest)
        with hold:
            try:
                config = self._blobs.read(digest, CONFIG)
                weights = self._blobs.map(digest, WEIGHTS)
            except FileNotFoundError:
                raise lookup.gone(digest) from None
        if digest in self._unremoved:  # its removal met this hold
            self._remove_unreferenced([])
        try:
            return read_stored(digest, config, weights, self._shape, self._limits)
        except InvalidArgument as e:
            raise FailedPrecondition(
                "adapter: it was registered for another base or under other limits: " + e.message,
                field="adapter",
                reason=e.reason,
            ) from None

    def here(self, digest: str) -> bool:
        """Whether ``open`` need not wait for a shared store."""
        return self._contents.here(digest)

    def fetch(self, digest: str) -> None:
        """Have a content here. Raises what ``open`` raises where it is gone, and Unavailable."""
        if not self._whole(digest):
            raise lookup.gone(digest)

    def retain(self, digest: str) -> None:
        """Keep a content readable until it is released as often as it was retained.

        A request does so, that its version stays after a replacement. Raises NotFound.
        """
        if not self._contents.retain(digest):
            self._whole(digest)
            raise lookup.gone(digest)

    def release(self, digest: str) -> None:
        """Undo one ``retain``; a content that nothing refers to any more is removed."""
        if self._contents.release(digest) and digest not in self._state.digests:
            self._remove_unreferenced([digest])

    # Changing

    def check_card(self, card: RoutingCard) -> None:
        """Raise InvalidArgument for a card beyond the limits, or one of another base."""
        check_card(card, self._limits)
        self._check_base(card)

    def register(
        self,
        tenant: str,
        name: str,
        adapter: ValidatedAdapter,
        *,
        card: RoutingCard | None = None,
        tasks: Iterable[str] | None = None,
        replace: bool = False,
        quota: Quota | None = None,
    ) -> tuple[AdapterRecord, bool]:
        """Register an adapter; returns its record and whether that is new.

        ``card`` takes the place of the adapter's own, ``tasks`` that of the card's. The content
        that the name has already changes nothing, the card included; where it is damaged on the
        disk, it is whole again. Durable when it returns.

        Raises InvalidArgument for a bad name or card, AlreadyExists where the name has other
        content and ``replace`` is false, ResourceExhausted beyond max_adapters, the tenant's
        quota or disk space.
        """
        check_name(tenant, "tenant")
        check_name(name, "name")
        card = _with_tasks(card or adapter.card or RoutingCard(), tasks)
        if adapter.card is not None and not card.base_fingerprint:
            card = replaced(card, base_fingerprint=adapter.card.base_fingerprint)
        self.check_card(card)
        record = AdapterRecord(
            tenant=tenant,
            name=name,
            version=1,
            digest=adapter.digest,
            rank=adapter.rank,
            dora=adapter.dora,
            rslora=adapter.rslora,
            targets=adapter.targets,
            modules=len(adapter.modules),
            nbytes=adapter.nbytes,
            created=time.time(),
            card=card,
        )

        def change(state: State) -> Change | None:
            before = state.adapters.get(record.key)
            if before is not None and before.digest == record.digest:
                return None
            if quota is not None:
                quota.check(state.by_tenant.get(tenant, {}).values(), record)
            if before is None:
                self._check_count(state)
                return Change(state.revision + 1, None, record)
            if not replace:
                raise AlreadyExists(
                    f"name: {quoted(name)} is in use by version {before.version} with digest "
                    f"{before.digest}; set replace to make version {before.version + 1}, or "
                    "choose another name",
                    field="name",
                )
            after = replaced(record, version=before.version + 1, pinned=before.pinned)
            return Change(state.revision + 1, before, after)

        self._history.derive(change)  # refuse before gigabytes are written
        content: dict[str, Buffer] = {CONFIG: adapter.config, WEIGHTS: adapter.weights}
        try:
            with disk_errors():
                self._reserve.take()  # first, so that what a removal freed does not go to others
                with self._contents.put(adapter.digest, content):
                    self._offers.restore(adapter.digest)
                    state, made = self._history.commit(change)
                    self._contents.confirm(adapter.digest, content)
        finally:
            self._remove_unreferenced([adapter.digest])
        if made is not None and made.before is not None:
            self._remove_unreferenced([made.before.digest])
        return state.adapters[record.key], made is not None

    def update(
        self,
        tenant: str,
        name: str,
        *,
        card: RoutingCard | None = None,
        tasks: Iterable[str] | None = None,
    ) -> AdapterRecord:
        """Replace the card, or its tasks alone; the content and the version stay.

        A card that names no base keeps the base named before. Raises NotFound, InvalidArgument for
        a bad card, and PermissionDenied for a shared adapter of another tenant, as do ``pin`` and
        ``unregister``.
        """

        def change(record: AdapterRecord) -> AdapterRecord:
            new = _with_tasks(card or record.card, tasks)
            if not new.base_fingerprint:
                new = replaced(new, base_fingerprint=record.card.base_fingerprint)
            self.check_card(new)
            return replaced(record, card=new)

        return self._change_record(tenant, name, change)

    def pin(self, tenant: str, name: str, pinned: bool) -> AdapterRecord:
        """Keep an adapter on the device, or no longer. Raises NotFound."""
        return self._change_record(tenant, name, lambda record: replaced(record, pinned=pinned))

    def unregister(self, tenant: str, name: str) -> AdapterRecord:
        """Remove an adapter; what is retained stays readable. Raises NotFound."""
        removed = self._history.derive(lambda state: lookup.own(state, tenant, name))

        def change(state: State) -> Change:
            nonlocal removed
            removed = lookup.own(state, tenant, name)
            return Change(state.revision + 1, removed)

        with disk_errors():
            self._reserve.lend(lambda: self._history.commit(change))
        self._remove_unreferenced([removed.digest])
        self._reserve.renew()
        return removed

    def set_router(self, files: Mapping[str, bytes]) -> str:
        """Store the router's files, by name, in place of the one before; returns their digest.

        Raises InvalidArgument for a bad name.
        """
        for name in files:
            check_name(name, "router")
        router = RouterRecord(router_digest(files), tuple(sorted(files)))
        before = self._state.router

        def change(state: State) -> Change | None:
            return None if state.router == router else Change(state.revision + 1, router=router)

        try:
            with disk_errors():
                self._reserve.take()
                with self._contents.put(router.digest, files):
                    self._offers.restore(router.digest)
                    self._history.commit(change)
                    self._contents.confirm(router.digest, files)
        finally:
            self._remove_unreferenced([router.digest, *([before.digest] if before else [])])
        return router.digest

    def router(self) -> dict[str, bytes] | None:
        """The files of the stored router, or None where there is none, or a damaged one."""
        while (router := self._state.router) is not None:
            if not self._whole(router.digest) and router.digest not in self._offers:
                return None
            hold = self._blobs.hold(router.digest)
            if hold is not None:
                with hold:
                    return {name: self._blobs.read(router.digest, name) for name in router.files}
            if self._state.router == router:
                raise lookup.gone(router.digest)
        return None

    def subscribe(self, callback: Callable[[Change], None]) -> tuple[AdapterRecord, ...]:
        """Call ``callback`` with every change from now on, in order; returns ``all`` as it is now.

        It is called by the thread that makes a change or finds one, while no other is announced:
        it has to be quick, must not raise, and may only read the registry's state.
        """
        with self._history.lock:
            self._offers.subscribe(callback)
            return self.all()

    def refresh(self) -> None:
        """Take in what other processes have changed."""
        self._history.refresh()

    def poll(self) -> None:
        """As ``refresh``, at little cost where there is nothing: for calling it every second.

        Raises Unavailable where a shared store does not answer.
        """
        self._history.poll()

    def collect(self) -> int:
        """Remove contents from a shared store that nothing has referred to for a day.

        Returns how many. Raises Unavailable.
        """
        if not self._state.revision:
            return 0  # a history that is gone refers to nothing
        return self._storage.collect(lambda: self._history.newest().digests)

    # Inside

    def _change_record(
        self, tenant: str, name: str, edit: Callable[[AdapterRecord], AdapterRecord]
    ) -> AdapterRecord:
        def change(state: State) -> Change | None:
            before = lookup.own(state, tenant, name)
            after = edit(before)
            return None if after == before else Change(state.revision + 1, before, after)

        with disk_errors():
            state, _ = self._history.commit(change)
        return state.adapters[tenant, name]

    def _check_contents(self) -> None:
        """Find damaged contents, and what nothing refers to."""
        left, digests = (
            CHECKED_AT_START,
            {r.digest: r.nbytes for r in self._state.adapters.values()},
        )
        if self._state.router is not None:
            digests[self._state.router.digest] = 0
        for digest, nbytes in digests.items():
            left -= nbytes
            if self._contents.survey(digest, least=nbytes, deep=left >= 0) is not Health.SOUND:
                self._offers.withdraw(digest)
        unreferenced = self._contents.left(self._state.digests)
        if not self._log.lost:
            self._remove_unreferenced(unreferenced)
            return
        with self._history.lock:
            for digest in unreferenced:  # it may belong to a change that is lost
                check = functools.partial(self._is_unreferenced, digest)
                self._contents.set_unreferenced_aside(digest, check)

    def _whole(self, digest: str) -> bool:
        """Whether a content can be used; a damaged one is not offered any more."""
        if self._contents.look(digest) is Health.SOUND:
            return True
        if not self._is_unreferenced(digest):
            self._offers.withdraw(digest)
        return False

    def _remove_unreferenced(self, digests: Iterable[str]) -> None:
        with self._history.lock:
            self._unremoved |= set(digests)
            self._unremoved -= self._state.digests
            for digest in sorted(self._unremoved):
                try:
                    unreferenced = functools.partial(self._is_unreferenced, digest)
                    if self._contents.remove(digest, unreferenced):
                        self._unremoved.discard(digest)
                        self._contents.forget(digest)
                        self._offers.restore(digest)
                except OSError as e:  # it goes another time, at the next start at the latest
                    log.warning("registry: content %s is not removed: %s", digest, e.strerror)

    def _is_unreferenced(self, digest: str) -> bool:
        """Also by what another process has done by now."""
        return digest not in self._history.newest().digests

    def _offered(self, record: AdapterRecord) -> bool:
        return self._fits(record) and record.digest in self._offers

    def _fits(self, record: AdapterRecord) -> bool:
        base = record.card.base_fingerprint
        return not base or not self._fingerprint or base == self._fingerprint

    def _check_base(self, card: RoutingCard) -> None:
        if card.base_fingerprint and self._fingerprint not in ("", card.base_fingerprint):
            raise InvalidArgument(
                f"base_fingerprint: the card names base {card.base_fingerprint}, this server runs "
                f"{self._fingerprint}; register the adapter where its base runs",
                field="base_fingerprint",
                reason="WRONG_BASE",
            )

    def _check_count(self, state: State) -> None:
        if len(state.adapters) >= self._limits.max_adapters:
            raise ResourceExhausted(
                "name: as many adapters are registered as adapters.max_adapters allows; "
                "unregister one or raise the limit",
                field="name",
                reason="TOO_MANY_ADAPTERS",
            )


def _with_tasks(card: RoutingCard, tasks: Iterable[str] | None) -> RoutingCard:
    return card if tasks is None else replaced(card, tasks=tuple(tasks))
