"""The keys of all adapters: immutable, so that readers never lock.

Rows live in chunks by tenant. A change copies one chunk and the lists of chunks, nothing else;
a search touches the chunks of the caller's tenant alone. A key takes a byte a dimension for its
centre and for each prototype. Among very many a search narrows down: a part of each centre for
all, the whole centre for the better ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from mora_serve.router.arrays import Floats, Indices
from mora_serve.router.native import Stacked
from mora_serve.router.rows import Entry, Objects, Rows

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


class _Centres(NamedTuple):
    names: Objects  # [n] of str
    codes: Stacked  # [n, K]
    scales: Floats  # [n]
    listed: Indices  # where, sorted

    def cosines(self, z: Floats, positions: Indices) -> Floats:
        """Of z, or of its first numbers, with the centres at sorted positions."""
        some = None if len(positions) == len(self.names) else positions
        found = self.codes.products(z, some)
        found *= self.scales if some is None else self.scales[some]
        return found


@dataclass(frozen=True, eq=False)
class _Tenant:
    """A tenant's chunks; a position counts adapters through all of them."""

    chunks: tuple[_Chunk, ...]

    @cached_property
    def ends(self) -> Indices:
        return np.cumsum([len(chunk) for chunk in self.chunks], dtype=np.intp)

    @cached_property
    def centres(self) -> _Centres:
        """Of all chunks: one product is several times as fast as one a chunk."""
        rows = [chunk.rows for chunk in self.chunks]
        return _Centres(
            np.concatenate([r.names for r in rows]),
            Stacked([r.centres for r in rows]),
            np.concatenate([r.scales[:, 0] for r in rows]),
            np.flatnonzero(np.concatenate([r.listed for r in rows])),
        )

    def positions(self, names: Collection[str] | None) -> Indices:
        """Of the listed adapters, or of those named, sorted."""
        if names is None:
            return self.centres.listed
        asked, found = set(names), []
        for chunk, end in zip(self.chunks, self.ends, strict=True):
            known = asked & chunk.by_name.keys()
            found += [int(end) - len(chunk) + chunk.by_name[name] for name in known]
        return np.array(sorted(found), np.intp)

    def likely(self, z: Floats, positions: Indices, count: int) -> Indices:
        """Of very many those ``count`` that a part of each centre speaks for, equals included."""
        if len(positions) <= max(MANY, count):
            return positions
        found = self.centres.cosines(z[:COARSE], positions)
        likely: Indices = positions[found >= -np.partition(-found, count - 1)[count - 1]]
        return likely

    def pieces(self, positions: Indices) -> Iterator[tuple[Rows, Indices]]:
        """The rows at sorted positions, chunk by chunk."""
        cuts = np.searchsorted(positions, self.ends)
        start = 0
        for chunk, end, cut in zip(self.chunks, self.ends, cuts, strict=True):
            if cut > start:
                yield chunk.rows, positions[start:cut] - (end - len(chunk))
            start = cut


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
    ) -> Rows | None:
        """The ``count`` adapters whose centres are nearest to z [K], equal ones by name.

        In no particular order. Of the tenant's listed ones, or of those of ``names``. Another
        tenant's keys are not looked at, nor are the tenant's other ones where names are given.
        Names that are not in the index are left out. None where nobody is left.
        """
        own = self.tenants.get(tenant)
        if own is None or not len(asked := own.positions(names)):
            return None
        asked = own.likely(z, asked, max(LIKELY, count))
        cosines = own.centres.cosines(z, asked)
        best = asked[np.sort(_best(cosines, own.centres.names[asked], count))]
        return Rows.join(rows.take(chosen) for rows, chosen in own.pieces(best))

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
        return sum(t.centres.codes.nbytes + sum(c.rows.nbytes for c in t.chunks) for t in own)


def _best(values: Floats, names: Objects, count: int) -> Indices:
    """Where the ``count`` largest values are, largest first, equal ones by name."""
    count = min(count, len(values))
    ties = np.flatnonzero(values >= -np.partition(-values, count - 1)[count - 1])
    return ties[np.lexsort((names[ties].astype(str), -values[ties]))][:count]
