"""The keys of all adapters: immutable, so that readers never lock.

Rows live in chunks by tenant. A change copies one chunk and the lists of chunks; the next search
lists the tenant's names and where its keys are, and touches the chunks of that tenant and of the
shared adapters alone. A key takes a byte a dimension for its centre and for each prototype. Among
very many a search narrows down: a part of each centre for all, the whole one for the better ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from mora_serve.core import SHARED_TENANT
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

    def without(self, positions: Indices, names: Set[str]) -> Indices:
        """These positions but for those of some names."""
        start, gone = 0, []
        for chunk in self.chunks:
            gone += [start + chunk.by_name[name] for name in chunk.by_name.keys() & names]
            start += len(chunk)
        return np.setdiff1d(positions, gone, assume_unique=True) if gone else positions

    def nearest(self, z: Floats, positions: Indices, count: int) -> tuple[Indices, Floats]:
        """Of these positions the ``count`` with the centres nearest to z, and their cosines.

        A few more where some are equally near. Of more than ``MANY``, only those that a part of
        each centre speaks for are looked at.
        """
        keys = self.columns.keys
        if len(positions) > max(MANY, count):
            positions, _ = keys.search(z[:COARSE], positions, max(LIKELY, count))
        return keys.search(z, positions, count)


@dataclass(frozen=True, eq=False)
class Candidates:
    """Some adapters, n: a tenant's own ones, shared ones, each by their sorted positions."""

    parts: tuple[tuple[_Tenant, Indices], ...]

    @classmethod
    def nearest(cls, asked: Sequence[tuple[_Tenant, Indices]], z: Floats, count: int) -> Self:
        """Of those asked for the ``count`` with centres nearest to z [K], equal ones by name."""
        found = [(tenant, *tenant.nearest(z, positions, count)) for tenant, positions in asked]
        if sum(len(positions) for _, positions, _ in found) <= count:
            return cls(tuple((tenant, positions) for tenant, positions, _ in found))
        ranked = sorted(
            (-cosine, tenant.columns.names[i], part, i)
            for part, (tenant, positions, cosines) in enumerate(found)
            for cosine, i in zip(cosines.tolist(), positions.tolist(), strict=True)
        )[:count]
        return cls(
            tuple(
                (tenant, np.array(kept, np.intp))
                for part, (tenant, _, _) in enumerate(found)
                if (kept := sorted(i for _, _, of, i in ranked if of == part))
            )
        )

    @property
    def names(self) -> list[str]:
        """Of each."""
        return [t.columns.names[i] for t, positions in self.parts for i in positions.tolist()]

    @property
    def groups(self) -> list[str]:
        """Of each."""
        return [t.columns.groups[i] for t, positions in self.parts for i in positions.tolist()]

    def scores(self, z: Floats) -> tuple[Floats, Floats]:
        """Cosines of z [K] with each one's centre [n], and the best with a prototype [n]."""
        scores = [t.columns.keys.scores(z, positions) for t, positions in self.parts]
        if len(scores) == 1:
            return scores[0]
        centres, nearest = zip(*scores, strict=True)
        return np.concatenate(centres), np.concatenate(nearest)

    @property
    def centres(self) -> Floats:
        """Each one's centre [n, K]."""
        return np.concatenate([t.columns.keys.centres(positions) for t, positions in self.parts])

    def words(self, i: int) -> Words:
        """Sorted hashes of the words of the i-th one's examples."""
        tenant, position = self._at(i)
        return tenant.columns.words[position]

    def prototypes(self, i: int) -> Floats:
        """The prototypes of the i-th one [P, K]."""
        tenant, position = self._at(i)
        return tenant.columns.keys.prototypes(position)

    def joined(self, other: Candidates | None) -> Candidates:
        """With others of the same tenant and of those that it shares."""
        if other is None:
            return self
        both: dict[_Tenant, set[int]] = {}
        for tenant, positions in (*self.parts, *other.parts):
            both.setdefault(tenant, set()).update(positions.tolist())
        return Candidates(tuple((t, np.array(sorted(p), np.intp)) for t, p in both.items()))

    def _at(self, i: int) -> tuple[_Tenant, int]:
        for tenant, positions in self.parts:
            if i < len(positions):
                return tenant, int(positions[i])
            i -= len(positions)
        raise IndexError(i)


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
        hidden: Set[str] = frozenset(),
    ) -> Candidates | None:
        """The ``count`` adapters whose centres are nearest to z [K], equal ones by name.

        Of the listed ones that the tenant may use, its own and the shared ones that do not bear a
        ``hidden`` name, or of those of ``names``. Another tenant's keys are not looked at, nor are
        other ones where names are given. Names that are not in the index are left out. None where
        nobody is left.
        """
        asked = list(self._visible(tenant, names, hidden))
        return Candidates.nearest(asked, z, count) if asked else None

    def listed(self, tenant: str, hidden: Set[str] = frozenset()) -> int:
        """How many adapters can be picked unasked, of those that the tenant may use."""
        return sum(len(positions) for _, positions in self._visible(tenant, None, hidden))

    def _visible(
        self, tenant: str, names: Collection[str] | None, hidden: Set[str]
    ) -> Iterator[tuple[_Tenant, Indices]]:
        """The tenant's own part and the shared one, with positions; empty ones left out."""
        for owner in dict.fromkeys((tenant, SHARED_TENANT)):
            part = self.tenants.get(owner)
            if part is None:
                continue
            positions = part.positions(names)
            if owner != tenant and hidden:
                positions = part.without(positions, hidden)
            if len(positions):
                yield part, positions

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
