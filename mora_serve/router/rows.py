"""Adapters' keys as arrays, one row each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from mora_serve.router.arrays import Codes, Floats, Indices, Objects
from mora_serve.router.counting import sorted_words
from mora_serve.router.int8 import to_int8
from mora_serve.router.key_search import KeyParts
from mora_serve.router.router import AdapterKey


class Entry(NamedTuple):
    """One adapter as it enters the index.

    ``listed``: the router may pick it unasked, otherwise only where it is named. At most one
    adapter of a non-empty ``group`` runs in a mixture.
    """

    name: str
    key: AdapterKey
    group: str = ""
    listed: bool = True


class Rows(NamedTuple):
    """n adapters; keys in 8 bits."""

    names: Objects  # [n] of str
    groups: Objects  # [n] of str
    words: Objects  # [n] of sorted hashes
    listed: npt.NDArray[np.bool_]  # [n]
    centres: Codes  # [n, K]: times the scale, the centres
    prototypes: Codes  # [n, P, K]: times the scale, the prototypes
    scales: Floats  # [n, 1 + P]: of the centre, of the prototypes

    @classmethod
    def of(cls, entries: Collection[Entry]) -> Self:
        """From one entry or more."""
        keys = [e.key for e in entries]
        centres, scale = to_int8(np.stack([k.centre for k in keys]))
        stacked = np.stack([k.prototypes for k in keys])
        codes, scales = to_int8(stacked.reshape(-1, stacked.shape[-1]))
        words = np.empty(len(keys), object)
        words[:] = [sorted_words(k.words) for k in keys]
        return cls(
            np.array([e.name for e in entries], object),
            np.array([e.group for e in entries], object),
            words,
            np.array([e.listed for e in entries]),
            centres,
            codes.reshape(stacked.shape),
            np.column_stack((scale, scales.reshape(len(keys), -1))),
        )

    @classmethod
    def join(cls, parts: Iterable[Self]) -> Self:
        """One after another, of one part or more."""
        return cls._make(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def take(self, rows: Indices) -> Self:
        """Some of them, in that order."""
        return type(self)._make([column[rows] for column in self])

    @property
    def keys(self) -> KeyParts:
        """The keys alone."""
        return KeyParts(self.centres, self.prototypes, self.scales)

    @property
    def nbytes(self) -> int:
        """Memory of the keys, names and words apart."""
        return sum(column.nbytes for column in self[3:])
