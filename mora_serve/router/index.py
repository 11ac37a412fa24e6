"""The keys of all adapters: immutable, so that readers never lock.

Rows live in chunks by tenant. A change copies one chunk and the lists of chunks; the next search
lists the tenant's names and where its keys are, and touches the chunks of that tenant alone. A key
takes a byte a dimension for its centre and for each prototype. Among very many a search narrows
down: a part of each centre for all, the whole centre for the better ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from mora_serve.router.arrays import Floats, Indices, Words
from mora_serve.router.key_search import Keys
from mora_serve.router.rows import Entry, Rows

CHUNK = 256  # adapters
MANY = 2048  # adapters, of which the whole centres are read
COARSE = 256  # dimensions of a centre that more are searched by
LIKELY = 256  # adapters of these of which the whole centre counts
FOUND = 24  # candidates


@dataclass(frozen=True, eq=False)
class _Chunk:
    rows: Rows
    by_name: Mapping[str, int]

    @classmethod
    def of(cls, rows: Rows) -> Self:
        return cls(rows, {name: row for row, name in enumerate(rows.names)})

    def __len__(self) -> int:
        return len(self.rows.names)


class _Columns(NamedTuple):
    """Of all of a tenant's chunks, one after another."""

    names: list[str]
    groups: list[str]
    words: list[Words]
    listed: Indices  # where, sorted
    keys: Keys

    @classmethod
    def of(cls, parts: Sequence[Rows]) -> Self:
        return cls(
            np.concatenate([rows.names for rows in parts]).tolist(),
            np.concatenate([rows.groups for rows in parts]).tolist(),
            np.concatenate([rows.words for rows in parts]).tolist(),
            np.flatnonzero(np.concatenate([rows.listed for rows in parts])),
            Keys([rows.keys for rows in parts]),
        )


@dataclass(frozen=True, eq=False)
class _Tenant:
    """A tenant's chunks; a position counts adapters through all of them."""

    chunks: tuple[_Chunk, ...]

    @cached_property
    def columns(self) -> _Columns:
        return _Columns.of([chunk.rows for chunk in self.chunks])

    def positions(self, names: Collection[str] | None) -> Indices:
        """Of the listed adapters, or of those named, sorted."""
        if names is None:
            return self.columns.listed
        asked, found, start = set(names), [], 0
        for chunk in self.chunks:
            found += [start + chunk.by_name[name] for name in asked & chunk.by_name.keys()]
            start += len(chunk)
        return np.array(sorted(found), np.intp)

    def nearest(self, z: Floats, positions: Indices, count: int) -> Indices:
        """Of these positions the ``count`` with the centres nearest to z, equal ones by name.

        Of more than ``MANY``, only those that a part of each centre speaks for are looked at.
        """
        columns = self.columns
        if len(positions) > max(MANY, count):
            positions, _ = columns.keys.search(z[:COARSE], positions, max(LIKELY, count))
        found, cosines = columns.keys.search(z, positions, count)
        if len(found) > count:
            ranked = zip((-cosines).tolist(), (columns.names[i] for i in found), found, strict=True)
            found = np.sort(np.array([i for _, _, i in sorted(ranked)[:count]], np.intp))
        return found


@dataclass(frozen=True, eq=False)
class Candidates:
    """Some of a tenant's adapters, n, by their sorted positions."""

    tenant: _Tenant
    positions: Indices

    @property
    def names(self) -> list[str]:
        """Of each."""
        return [self.tenant.columns.names[i] for i in self.positions.tolist()]

    @property
    def groups(self) -> list[str]:
        """Of each."""
        return [self.tenant.columns.groups[i] for i in self.positions.tolist()]

    def scores(self, z: Floats) -> tuple[Floats, Floats]:
        """Cosines of z [K] with each one's centre [n], and the best with a prototype [n]."""
        return self.tenant.columns.keys.scores(z, self.positions)

    def words(self, i: int) -> Words:
        """Sorted hashes of the words of the i-th one's examples."""
        return self.tenant.columns.words[int(self.positions[i])]

    def prototypes(self, i: int) -> Floats:
        """The prototypes of the i-th one [P, K]."""
        return self.tenant.columns.keys.prototypes(int(self.positions[i]))

    def joined(self, other: Candidates | None) -> Candidates:
        """With others of the same tenant."""
        if other is None:
            return self
        both = {*self.positions.tolist(), *other.positions.tolist()}
        return Candidates(self.tenant, np.array(sorted(both), np.intp))


@dataclass(frozen=True, eq=False)
class Index:
    """Adapters by (tenant, name); ``put`` and ``remove`` give a new index."""

    tenants: Mapping[str, _Tenant] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[tuple[str, Entry]]) -> Self:
        """An index of (tenant, entry) pairs; of two with one name the later counts."""
        return cls.of_rows((tenant, Rows.of([entry])) for tenant, entry in entries)

    @classmethod
    def of_rows(cls, rows_of: Iterable[tuple[str, Rows]]) -> Self:
        """As ``of``, from (tenant, rows of one adapter) pairs: a quarter of entries' memory."""
        named: dict[str, dict[str, Rows]] = {}
        for tenant, row in rows_of:
            named.setdefault(tenant, {})[row.names[0]] = row
        tenants = {}
        for tenant, by_name in named.items():
            rows = list(by_name.values())
            starts = range(0, len(rows), CHUNK)
            parts = tuple(_Chunk.of(Rows.join(rows[i : i + CHUNK])) for i in starts)
            tenants[tenant] = _Tenant(parts)
        return cls(tenants)

    def put(self, tenant: str, entry: Entry) -> Self:
        """With the entry, in place of one of its name."""
        rest = self.remove(tenant, entry.name)
        own = list(rest._chunks(tenant))
        new = Rows.of([entry])
        for i, chunk in enumerate(own):
            if len(chunk) < CHUNK:
                own[i] = _Chunk.of(Rows.join((chunk.rows, new)))
                break
        else:
            own.append(_Chunk.of(new))
        return type(self)({**rest.tenants, tenant: _Tenant(tuple(own))})

    def remove(self, tenant: str, name: str) -> Self:
        """Without the adapter, if it is there."""
        if (tenant, name) not in self:
            return self
        rest = []
        for chunk in self._chunks(tenant):
            if name not in chunk.by_name:
                rest.append(chunk)
            elif len(chunk) > 1:
                kept = np.delete(np.arange(len(chunk)), chunk.by_name[name])
                rest.append(_Chunk.of(chunk.rows.take(kept)))
        tenants = {**self.tenants, tenant: _Tenant(tuple(rest))}
        if not rest:
            del tenants[tenant]
        return type(self)(tenants)

    def candidates(
        self,
        tenant: str,
        z: Floats,
        names: Collection[str] | None = None,
        count: int = FOUND,
    ) -> Candidates | None:
        """The ``count`` adapters whose centres are nearest to z [K], equal ones by name.

        Of the tenant's listed ones, or of those of ``names``. Another tenant's keys are not
        looked at, nor are the tenant's other ones where names are given. Names that are not in
        the index are left out. None where nobody is left.
        """
        own = self.tenants.get(tenant)
        if own is None or not len(asked := own.positions(names)):
            return None
        return Candidates(own, own.nearest(z, asked, count))

    def listed(self, tenant: str) -> int:
        """How many of the tenant's adapters can be picked unasked."""
        return sum(int(chunk.rows.listed.sum()) for chunk in self._chunks(tenant))

    def _chunks(self, tenant: str) -> tuple[_Chunk, ...]:
        own = self.tenants.get(tenant)
        return () if own is None else own.chunks

    def __contains__(self, key: tuple[str, str]) -> bool:
        tenant, name = key
        return any(name in chunk.by_name for chunk in self._chunks(tenant))

    def __len__(self) -> int:
        return sum(len(chunk) for own in self.tenants.values() for chunk in own.chunks)

    @property
    def nbytes(self) -> int:
        """Memory of the keys, names and words apart."""
        own = self.tenants.values()
        return sum(t.columns.keys.nbytes + sum(c.rows.nbytes for c in t.chunks) for t in own)
