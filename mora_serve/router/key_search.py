"""Keys in 8 bits: searched, and scored against a prompt.

A key's products are sums of integers, so that they have the same bits compiled and in numpy, and
whatever is beside them, which no BLAS promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mora_serve.router import native
from mora_serve.router.arrays import Codes, Floats, Indices
from mora_serve.router.native import address

_MOST_CODE = 16383  # of a query in 15 bits


class KeyParts(NamedTuple):
    """Keys of some adapters in 8 bits, as ``Rows`` has them."""

    centres: Codes  # [n, K]
    prototypes: Codes  # [n, P, K]
    scales: Floats  # [n, 1 + P]


class Keys:
    """Keys of several arrays, one after another [n], read where they are.

    Positions that are not below n raise IndexError, and another z than of K numbers (for
    ``search`` a longer one) ValueError: a compiled loop would read past the rows.
    """

    def __init__(self, parts: Sequence[KeyParts]) -> None:
        """One part or more. Raises ValueError unless all are of one K and P, each 1 or more."""
        # kept: what the addresses lead to
        self._parts = [
            KeyParts(
                np.ascontiguousarray(part.centres, np.int8),
                np.ascontiguousarray(part.prototypes, np.int8),
                np.ascontiguousarray(part.scales, np.float32),
            )
            for part in parts
        ]
        _, count, size = self._parts[0].prototypes.shape
        for centres, prototypes, scales in self._parts:
            n = len(centres)
            shapes = centres.shape, prototypes.shape, scales.shape
            if shapes != ((n, size), (n, count, size), (n, 1 + count)) or not count * size:
                raise ValueError(f"keys of shapes {shapes} beside {count} prototypes of {size}")
        columns = zip(*self._parts, strict=True)
        self._addresses = [np.concatenate([_rows(c) for c in column]) for column in columns]
        self._centres, self._prototypes, self._scales = (a.ctypes.data for a in self._addresses)
        self._count, self._size = count, size

    def __len__(self) -> int:
        return len(self._addresses[0])

    @property
    def nbytes(self) -> int:
        """Memory besides the parts."""
        return sum(addresses.nbytes for addresses in self._addresses)

    def search(self, z: Floats, at: Indices, count: int) -> tuple[Indices, Floats]:
        """Those of the positions ``at`` whose centres have the ``count`` largest cosines with z.

        All that equal the last of them are found too. z [at most K] counts as far as it goes.
        -> positions in the order of ``at``, and their cosines.
        """
        if not 0 < len(z) <= self._size:
            raise ValueError(f"{len(z)} numbers for keys of {self._size}")
        count = min(count, len(at))
        if count < 1:
            return at[:0], np.zeros(0, np.float32)
        lib = native.library()
        if lib is None:
            chosen = self._chosen(at)
            values = _products(chosen.centres[:, : len(z)], chosen.scales[:, 0], z)
            which = values >= np.partition(values, -count)[-count]
            return at[which], values[which]
        z, at = np.ascontiguousarray(z, np.float32), np.ascontiguousarray(at, np.intp)
        values, found = np.empty(len(at), np.float32), np.empty(len(at), np.intp)
        size = lib.mora_search(
            *(
                self._centres,
                self._scales,
                len(self),
                address(at),
                len(at),
                address(z),
                len(z),
                count,
            ),
            *(address(values), address(found)),
        )
        if size < 0:
            raise self._past(at)
        return found[:size], values[:size]

    def scores(self, z: Floats, at: Indices) -> tuple[Floats, Floats]:
        """Cosines of z [K] with the centres at some positions, and the best with a prototype."""
        if len(z) != self._size:
            raise ValueError(f"{len(z)} numbers for keys of {self._size}")
        lib = native.library()
        if lib is None:
            centres, prototypes, scales = self._chosen(at)
            near = _products(prototypes.reshape(-1, self._size), scales[:, 1:].ravel(), z)
            best: Floats = near.reshape(len(at), self._count).max(1)
            return _products(centres, scales[:, 0], z), best
        z, at = np.ascontiguousarray(z, np.float32), np.ascontiguousarray(at, np.intp)
        cosines, nearest = np.empty((2, len(at)), np.float32)
        error = lib.mora_scores(
            *(
                self._centres,
                self._prototypes,
                self._scales,
                len(self),
                address(at),
                len(at),
            ),
            *(
                self._count,
                address(z),
                len(z),
                address(cosines),
                address(nearest),
            ),
        )
        if error:
            raise self._past(at)
        return cosines, nearest

    def centres(self, at: Indices) -> Floats:
        """Of the keys at some positions [n, K]."""
        codes, _, scales = self._chosen(at)
        found: Floats = codes * scales[:, :1]
        return found

    def prototypes(self, at: int) -> Floats:
        """Of the key at a position [P, K]."""
        _, prototypes, scales = self._chosen(np.array([at]))
        found: Floats = prototypes[0] * scales[0, 1:, None]
        return found

    def _chosen(self, at: Indices) -> KeyParts:
        if len(at) and not 0 <= at.min() <= at.max() < len(self):
            raise self._past(at)
        return KeyParts._make(np.concatenate(c)[at] for c in zip(*self._parts, strict=True))

    def _past(self, at: Indices) -> IndexError:
        return IndexError(f"positions {at.min()} to {at.max()} of {len(self)} keys")


def _rows(array: np.typing.NDArray[np.generic]) -> Indices:
    """The address of each row of a contiguous array."""
    return array.ctypes.data + array.strides[0] * np.arange(len(array), dtype=np.intp)


def _products(rows: Codes, scales: Floats, z: Floats) -> Floats:
    """Rows in 8 bits [n, k] times z [k] in 15, the same bits as compiled: sums of integers."""
    limit = np.float32(min((2**31 - 1) // 128 // len(z), _MOST_CODE))
    most = np.abs(z).max().astype(np.float32)
    factor = limit / most if most > native.LEAST else np.float32(0)
    codes = np.rint(z.astype(np.float32) * factor).astype(np.int64)
    sums = rows.astype(np.int64) @ codes
    products: Floats = sums.astype(np.float32) * (most / limit * scales)
    return products
