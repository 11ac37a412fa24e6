"""The keys of all adapters: immutable, so that readers never lock.

Rows live in chunks by tenant. A change copies one chunk and the lists of chunks, nothing else;
scoring touches the chunks of the caller's tenant alone. A key takes a byte a dimension, so 10,000
adapters with keys of 512 fit in 6 MB.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from mora_serve.router.features import Floats, Indices
from mora_serve.router.int8 import Codes, to_int8
from mora_serve.router.router import AdapterKey

CHUNK = 256  # adapters
Texts = npt.NDArray[np.object_]  # of str; joined 10 times faster than tuples


class Entry(NamedTuple):
    """One adapter as it enters the index.

    ``listed``: the router may pick it unasked, otherwise only where it is named. At most one
    adapter of a non-empty ``group`` runs in a mixture.
    """

    name: str
    key: AdapterKey
    group: str = ""
    listed: bool = True


@dataclass(frozen=True, eq=False)
class Scores:
    """What a prompt scores with n adapters, in no particular order.

    ``names`` and ``groups`` [n]. ``cosine`` with the key, ``normed`` by the impostors' mean and
    deviation, ``relative``: 0 for an impostor's cosine, 1 for an own prompt's; all [n] float32.
    """

    names: Texts
    groups: Texts
    cosine: Floats
    normed: Floats
    relative: Floats


@dataclass(frozen=True, eq=False)
class _Chunk:
    names: Texts  # [n]
    groups: Texts  # [n]
    listed: npt.NDArray[np.bool_]  # [n]
    codes: Codes  # [n, K]: times the scale, the keys
    stats: Floats  # [n, 4]: scale, impostor mean, impostor deviation, own
    rows: Mapping[str, int]

    @classmethod
    def of(cls, entries: Collection[Entry]) -> Self:
        keys = [e.key for e in entries]
        codes, scales = to_int8(np.stack([k.prototype for k in keys]))
        stats = [(k.impostor_mean, k.impostor_std, k.own) for k in keys]
        return cls(
            np.array([e.name for e in entries], object),
            np.array([e.group for e in entries], object),
            np.array([e.listed for e in entries]),
            codes,
            np.column_stack((scales, np.array(stats, np.float32))),
            {e.name: row for row, e in enumerate(entries)},
        )

    def select(self, rows: Indices) -> Self:
        names = self.names[rows]
        return type(self)(
            names,
            self.groups[rows],
            self.listed[rows],
            self.codes[rows],
            self.stats[rows],
            {name: row for row, name in enumerate(names)},
        )

    def __add__(self, other: Self) -> Self:
        names = np.concatenate((self.names, other.names))
        return type(self)(
            names,
            np.concatenate((self.groups, other.groups)),
            np.concatenate((self.listed, other.listed)),
            np.concatenate((self.codes, other.codes)),
            np.concatenate((self.stats, other.stats)),
            {name: row for row, name in enumerate(names)},
        )

    def score(self, z: Floats) -> Scores:
        # einsum without BLAS: a row's sum has the same bits whatever rows stand beside it.
        scale, low, deviation, own = self.stats.T
        cosine = np.einsum("nk,k->n", self.codes.astype(np.float32), z) * scale
        above = cosine - low
        return Scores(self.names, self.groups, cosine, above / deviation, above / (own - low))


@dataclass(frozen=True, eq=False)
class Index:
    """Adapters by (tenant, name); ``put`` and ``remove`` give a new index."""

    chunks: Mapping[str, tuple[_Chunk, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[tuple[str, Entry]]) -> Self:
        """An index of (tenant, entry) pairs; of two with one name the later counts."""
        tenants: dict[str, dict[str, Entry]] = {}
        for tenant, entry in entries:
            tenants.setdefault(tenant, {})[entry.name] = entry
        chunks = {}
        for tenant, by_name in tenants.items():
            rows = list(by_name.values())
            starts = range(0, len(rows), CHUNK)
            chunks[tenant] = tuple(_Chunk.of(rows[i : i + CHUNK]) for i in starts)
        return cls(chunks)

    def put(self, tenant: str, entry: Entry) -> Self:
        """With the entry, in place of one of its name."""
        chunks = self.remove(tenant, entry.name).chunks
        own = list(chunks.get(tenant, ()))
        new = _Chunk.of([entry])
        for i, chunk in enumerate(own):
            if len(chunk.names) < CHUNK:
                own[i] = chunk + new
                break
        else:
            own.append(new)
        return type(self)({**chunks, tenant: tuple(own)})

    def remove(self, tenant: str, name: str) -> Self:
        """Without the adapter, if it is there."""
        if (tenant, name) not in self:
            return self
        rest = []
        for chunk in self.chunks[tenant]:
            if name not in chunk.rows:
                rest.append(chunk)
            elif len(chunk.names) > 1:
                kept = np.delete(np.arange(len(chunk.names)), chunk.rows[name])
                rest.append(chunk.select(kept))
        chunks = {**self.chunks, tenant: tuple(rest)}
        if not rest:
            del chunks[tenant]
        return type(self)(chunks)

    def score(self, tenant: str, z: Floats, names: Collection[str] | None = None) -> Scores:
        """Score z [K] with the tenant's listed adapters, or with those of ``names``.

        Another tenant's keys are not looked at, nor are the tenant's other ones where names are
        given. Names that are not in the index are left out.
        """
        parts = [chunk.score(z) for chunk in self._candidates(tenant, names)]
        if not parts:
            none, nobody = np.zeros(0, np.float32), np.zeros(0, object)
            return Scores(nobody, nobody, none, none, none)
        return Scores(
            np.concatenate([part.names for part in parts]),
            np.concatenate([part.groups for part in parts]),
            np.concatenate([part.cosine for part in parts]),
            np.concatenate([part.normed for part in parts]),
            np.concatenate([part.relative for part in parts]),
        )

    def _candidates(self, tenant: str, names: Collection[str] | None) -> Iterator[_Chunk]:
        for chunk in self.chunks.get(tenant, ()):
            if names is None:
                rows = np.flatnonzero(chunk.listed)
            else:
                rows = np.array([chunk.rows[n] for n in set(names) if n in chunk.rows], np.intp)
            if len(rows):
                yield chunk if len(rows) == len(chunk.names) else chunk.select(rows)

    def __contains__(self, key: tuple[str, str]) -> bool:
        tenant, name = key
        return any(name in chunk.rows for chunk in self.chunks.get(tenant, ()))

    def __len__(self) -> int:
        return sum(len(chunk.names) for own in self.chunks.values() for chunk in own)

    @property
    def nbytes(self) -> int:
        """Memory of the keys and their statistics."""
        chunks = [chunk for own in self.chunks.values() for chunk in own]
        return sum(c.codes.nbytes + c.stats.nbytes + c.listed.nbytes for c in chunks)
