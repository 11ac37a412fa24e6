"""What the registry knows of an adapter, and its state: all records, and how one changes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mora_serve.adapters.card import RoutingCard

Key = tuple[str, str]  # tenant, name


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
    updated (both are set); or the router was replaced (neither is).
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


@dataclass(frozen=True)
class State:
    """All records after change number ``revision``. Never changed, only succeeded."""

    revision: int = 0
    adapters: Mapping[Key, AdapterRecord] = field(default_factory=dict)
    router: RouterRecord | None = None

    @functools.cached_property
    def by_tenant(self) -> Mapping[str, Mapping[str, AdapterRecord]]:
        """Records by tenant and name, names in order."""
        tenants: dict[str, dict[str, AdapterRecord]] = {}
        for (tenant, name), record in sorted(self.adapters.items()):
            tenants.setdefault(tenant, {})[name] = record
        return tenants

    @functools.cached_property
    def by_task(self) -> Mapping[Key, tuple[AdapterRecord, ...]]:
        """Records by (tenant, task), names in order."""
        tasks: dict[Key, tuple[AdapterRecord, ...]] = {}
        for (tenant, _), record in sorted(self.adapters.items()):
            for task in dict.fromkeys(record.tasks):
                tasks[tenant, task] = (*tasks.get((tenant, task), ()), record)
        return tasks

    @functools.cached_property
    def digests(self) -> frozenset[str]:
        """Contents that the state refers to."""
        router = {self.router.digest} if self.router else set()
        return frozenset(r.digest for r in self.adapters.values()) | router

    def after(self, change: Change) -> State:
        """The state that a change leads to."""
        if change.router is not None:
            return State(change.revision, self.adapters, change.router)
        adapters = dict(self.adapters)
        if change.before is not None:
            adapters.pop(change.before.key, None)
        if change.after is not None:
            adapters[change.after.key] = change.after
        return State(change.revision, adapters, self.router)

    def change_from_json(self, values: Mapping[str, Any]) -> Change:
        """The next change, as the log has it."""
        revision = self.revision + 1
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
        return cls(revision, {r.key: r for r in records}, router)


def _router(values: Mapping[str, Any]) -> RouterRecord:
    return RouterRecord(values["digest"], tuple(values["files"]))
