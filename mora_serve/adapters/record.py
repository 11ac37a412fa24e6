"""What the registry knows of an adapter, and its state: all records, and how one changes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from mora_serve.adapters.card import RoutingCard
from mora_serve.core import SHARED_TENANT
from mora_serve.errors import ResourceExhausted

Key = tuple[str, str]  # tenant, name

K = TypeVar("K")
V = TypeVar("V", bound=Sized)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One registered adapter.

    ``version`` counts the contents that the name has had since it was registered, from 1.
    ``digest`` is the content's. ``modules`` is the number of projections changed, ``targets``
    their names, ``nbytes`` the weights' size, ``created`` when this version was registered, in
    unix seconds.
    """

    tenant: str
    name: str
    version: int
    digest: str
    rank: int
    dora: bool
    rslora: bool
    targets: tuple[str, ...]
    modules: int
    nbytes: int
    created: float
    pinned: bool = False
    card: RoutingCard = field(default_factory=RoutingCard)

    @property
    def key(self) -> Key:
        """(tenant, name)."""
        return self.tenant, self.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """The hints that select it."""
        return self.card.tasks

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> AdapterRecord:
        """The inverse of ``to_json`` after a way through JSON."""
        card = dict(values["card"])
        for name in ("tasks", "prompts"):
            card[name] = tuple(card[name])
        return cls(**{**values, "targets": tuple(values["targets"]), "card": RoutingCard(**card)})


@dataclass(frozen=True, slots=True)
class RouterRecord:
    """The stored router: its content's digest and the names of its files."""

    digest: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """One step of the registry, for subscribers.

    An adapter was registered (``before`` is None), removed (``after`` is None), replaced or
    updated (both are set); or the router was replaced (neither is). One that is lost has none.
    """

    revision: int
    before: AdapterRecord | None = None
    after: AdapterRecord | None = None
    router: RouterRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for the log."""
        if self.router is not None:
            return {"router": dataclasses.asdict(self.router)}
        if self.after is not None:
            return {"put": self.after.to_json()}
        return {"remove": self.before.key if self.before else None}


@dataclass(frozen=True, slots=True)
class Quota:
    """The most adapters of a tenant, and the most bytes of their weights; None for no limit."""

    adapters: int | None = None
    nbytes: int | None = None

    def check(self, own: Iterable[AdapterRecord], record: AdapterRecord) -> None:
        """Raise ResourceExhausted where a tenant with these adapters may not have ``record``."""
        others = [r for r in own if r.name != record.name]
        if self.adapters is not None and len(others) >= self.adapters:
            raise ResourceExhausted(
                f"name: the tenant has {len(others)} adapters, as many as its limit allows; "
                "unregister one",
                field="name",
                reason="TENANT_ADAPTERS",
            )
        total = sum(r.nbytes for r in others) + record.nbytes
        if self.nbytes is not None and total > self.nbytes:
            raise ResourceExhausted(
                f"name: the tenant's adapters would have {total} bytes of weights, its limit is "
                f"{self.nbytes}; unregister one",
                field="name",
                reason="TENANT_BYTES",
            )


@dataclass(frozen=True)
class State:
    """All records after change number ``revision``. Never changed, only succeeded.

    ``by_tenant`` has them by tenant and name, ``by_task`` by (tenant, task), both with the names
    in order. A change touches its own part of them: with thousands of adapters, deriving them
    anew would keep other threads waiting for milliseconds.
    """

    revision: int = 0
    adapters: Mapping[Key, AdapterRecord] = field(default_factory=dict)
    router: RouterRecord | None = None
    by_tenant: Mapping[str, Mapping[str, AdapterRecord]] = field(default_factory=dict)
    by_task: Mapping[Key, tuple[AdapterRecord, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, revision: int, records: Iterable[AdapterRecord], router: RouterRecord | None
    ) -> State:
        """The state of some records, each with a key of its own."""
        adapters = {record.key: record for record in records}
        tenants: dict[str, dict[str, AdapterRecord]] = {}
        tasks: dict[Key, list[AdapterRecord]] = {}
        for (tenant, name), record in sorted(adapters.items()):
            tenants.setdefault(tenant, {})[name] = record
            for task in dict.fromkeys(record.tasks):
                tasks.setdefault((tenant, task), []).append(record)
        by_task = {key: tuple(found) for key, found in tasks.items()}
        return cls(revision, adapters, router, tenants, by_task)

    def find(self, tenant: str, name: str) -> AdapterRecord | None:
        """The adapter that the tenant means by a name: its own, or else the shared one."""
        own = self.adapters.get((tenant, name))
        return own if own is not None else self.adapters.get((SHARED_TENANT, name))

    def visible(self, tenant: str) -> tuple[AdapterRecord, ...]:
        """What the tenant may use, by name: its own, and the shared ones of other names."""
        own, shared = self.by_tenant.get(tenant, {}), self.by_tenant.get(SHARED_TENANT, {})
        return _joined(own, shared.values())

    def visible_for(self, tenant: str, task: str) -> tuple[AdapterRecord, ...]:
        """Those of ``visible`` that are for a task, by name."""
        own = {r.name: r for r in self.by_task.get((tenant, task), ())}
        shared = self.by_task.get((SHARED_TENANT, task), ())
        hidden = self.by_tenant.get(tenant, {})
        return _joined(own, (r for r in shared if r.name not in hidden))

    @functools.cached_property
    def digests(self) -> frozenset[str]:
        """Contents that the state refers to."""
        router = {self.router.digest} if self.router else set()
        return frozenset(r.digest for r in self.adapters.values()) | router

    def after(self, change: Change) -> State:
        """The state that a change leads to."""
        if change.router is not None:
            return replace(self, revision=change.revision, router=change.router)
        before, after = change.before, change.after
        if (record := after or before) is None:
            return replace(self, revision=change.revision)
        tenant, name = record.key
        adapters, by_tenant = dict(self.adapters), dict(self.by_tenant)
        by_task = dict(self.by_task)
        adapters.pop(record.key, None)
        if after is not None:
            adapters[record.key] = after
        _put(by_tenant, tenant, _with(by_tenant.get(tenant, {}), name, after))
        for task in {t for r in (before, after) if r is not None for t in r.tasks}:
            own = {r.name: r for r in by_task.get((tenant, task), ())}
            now = after if after is not None and task in after.tasks else None
            _put(by_task, (tenant, task), tuple(_with(own, name, now).values()))
        return State(change.revision, adapters, self.router, by_tenant, by_task)

    def change_from_json(self, revision: int, values: Mapping[str, Any]) -> Change:
        """The next change, as the log has it under its number."""
        if "router" in values:
            return Change(revision, router=_router(values["router"]))
        if "put" in values:
            record = AdapterRecord.from_json(values["put"])
            return Change(revision, self.adapters.get(record.key), record)
        return Change(revision, self.adapters.get(tuple(values["remove"])))

    def changes_to(self, later: State) -> list[Change]:
        """What differs in a later state, where the steps between are not known."""
        changes = [
            Change(later.revision, self.adapters.get(key), later.adapters.get(key))
            for key in sorted(self.adapters.keys() | later.adapters.keys())
            if self.adapters.get(key) != later.adapters.get(key)
        ]
        if later.router is not None and later.router != self.router:
            changes.append(Change(later.revision, router=later.router))
        return changes

    def to_json(self) -> dict[str, Any]:
        """Plain values for a snapshot."""
        return {
            "adapters": [record.to_json() for _, record in sorted(self.adapters.items())],
            "router": dataclasses.asdict(self.router) if self.router else None,
        }

    @classmethod
    def from_json(cls, revision: int, values: Mapping[str, Any]) -> State:
        """The inverse of ``to_json`` after a way through JSON."""
        records = [AdapterRecord.from_json(r) for r in values["adapters"]]
        router = _router(values["router"]) if values["router"] else None
        return cls.of(revision, records, router)


def _with(
    records: Mapping[str, AdapterRecord], name: str, record: AdapterRecord | None
) -> dict[str, AdapterRecord]:
    """Records by name, in order, with this one under its name, or (None) without one."""
    if record is None:
        return {n: r for n, r in records.items() if n != name}
    changed = {**records, name: record}
    return changed if name in records else {n: changed[n] for n in sorted(changed)}


def _put(parts: dict[K, V], key: K, part: V) -> None:
    """A part under its key; an empty one is left out."""
    parts[key] = part
    if not part:
        del parts[key]


def _router(values: Mapping[str, Any]) -> RouterRecord:
    return RouterRecord(values["digest"], tuple(values["files"]))


def _joined(
    own: Mapping[str, AdapterRecord], shared: Iterable[AdapterRecord]
) -> tuple[AdapterRecord, ...]:
    """By name; a shared one gives way to one of the tenant's own."""
    others = [r for r in shared if r.name not in own]
    if not others:
        return tuple(own.values())
    return tuple(sorted((*own.values(), *others), key=lambda r: r.name))
