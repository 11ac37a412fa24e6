"""The router's inner loops: compiled where there was a compiler, else in numpy.

Each is some microseconds of work, so the compiled ones keep Python's lock: to get it back beside
a busy thread would take longer. A key's products are sums of integers, so that they have the same
bits either way and whatever is beside them, which no BLAS promises; weighted sums may differ by
their rounding.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from ctypes import c_double, c_int, c_void_p
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from mora_serve.router.arrays import Codes, Doubles, Floats, Hashes, Indices, Words

VERSION = 3  # native.c's
_WORD = re.compile(rb"[^ ]+")
_SPACE = 0x20
_BYTE = ctypes.c_char * 1
_LEAST = 1e-15  # shorter vectors are nothing
_MOST_CODE = 16383  # of a query in 15 bits
_QUOTED, _END = 1 << 40, 1 << 41  # beyond the hash of any word
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))


@cache
def library() -> ctypes.PyDLL | None:
    """The compiled library, or None where it was not built or is of another version."""
    spec = importlib.util.find_spec("mora_serve.router._native")
    if spec is None or spec.origin is None or np.dtype(np.intp).itemsize != 8:
        return None
    try:
        lib = ctypes.PyDLL(spec.origin)
        if lib.mora_router_version() != VERSION:
            return None
    except (OSError, AttributeError):
        return None
    p, i = c_void_p, c_int
    lib.mora_search.argtypes = [p, p, i, p, i, p, i, i, p, p]
    lib.mora_scores.argtypes = [p, p, p, i, p, i, i, p, i, p, p]
    lib.mora_embed.argtypes = [p, p, p, i, p, p, i, p]
    lib.mora_embed_text.argtypes = [p, p, p, i, p, p, i, c_double, i, i, i, p, p]
    lib.mora_without.argtypes = [p, p, i, p, i]
    lib.mora_features.argtypes = [p, p, i, c_double, i, i, i, p]
    for function in (lib.mora_embed, lib.mora_embed_text, lib.mora_features):
        function.restype = None
    return lib


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
        lib = library()
        if lib is None:
            chosen = self._chosen(at)
            values = _products(chosen.centres[:, : len(z)], chosen.scales[:, 0], z)
            which = values >= np.partition(values, -count)[-count]
            return at[which], values[which]
        z, at = np.ascontiguousarray(z, np.float32), np.ascontiguousarray(at, np.intp)
        values, found = np.empty(len(at), np.float32), np.empty(len(at), np.intp)
        size = lib.mora_search(
            *(self._centres, self._scales, len(self), _at(at), len(at), _at(z), len(z), count),
            *(_at(values), _at(found)),
        )
        if size < 0:
            raise self._past(at)
        return found[:size], values[:size]

    def scores(self, z: Floats, at: Indices) -> tuple[Floats, Floats]:
        """Cosines of z [K] with the centres at some positions, and the best with a prototype."""
        if len(z) != self._size:
            raise ValueError(f"{len(z)} numbers for keys of {self._size}")
        lib = library()
        if lib is None:
            centres, prototypes, scales = self._chosen(at)
            near = _products(prototypes.reshape(-1, self._size), scales[:, 1:].ravel(), z)
            best: Floats = near.reshape(len(at), self._count).max(1)
            return _products(centres, scales[:, 0], z), best
        z, at = np.ascontiguousarray(z, np.float32), np.ascontiguousarray(at, np.intp)
        cosines, nearest = np.empty((2, len(at)), np.float32)
        error = lib.mora_scores(
            *(self._centres, self._prototypes, self._scales, len(self), _at(at), len(at)),
            *(self._count, _at(z), len(z), _at(cosines), _at(nearest)),
        )
        if error:
            raise self._past(at)
        return cosines, nearest

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


class Counting(NamedTuple):
    """How the features of a text are counted; see ``count_features``."""

    pairs: float
    lengths: range
    dim: int


class Projection:
    """What features [D] are multiplied by to embed them as unit vectors [K]."""

    def __init__(self, rows: Codes, scales: Floats, mean: Floats) -> None:
        """Rows [D, K] times ``scales`` [K]; the features have the ``mean`` [D]."""
        self._rows = np.ascontiguousarray(rows, np.int8)
        self._scales, self._mean = np.ascontiguousarray(scales, np.float32), mean
        offset = mean.astype(np.float64) @ rows.astype(np.float64) * scales
        self._offset = np.ascontiguousarray(offset, np.float32)
        fixed = (self._rows, self._scales, self._offset)
        self._arrays = (*(array.ctypes.data for array in fixed), len(scales))

    def part(self, size: int) -> Projection:
        """Of the first ``size`` features alone."""
        return Projection(self._rows[:size], self._scales, self._mean[:size])

    def embed(self, index: Indices, values: Floats) -> Floats:
        """Features ``values`` [n], at ``index`` [n], as a unit vector; zeros where n is 0.

        Raises IndexError for an index that is not below D, and ValueError for another number of
        values: a compiled loop would read past them.
        """
        size, out = len(self._rows), np.zeros(len(self._scales), np.float32)
        if len(index) != len(values):
            raise ValueError(f"{len(index)} indices of {len(values)} features")
        if not len(index):
            return out
        if not 0 <= int(index.min()) <= int(index.max()) < size:
            raise IndexError(f"features {int(index.min())} to {int(index.max())} of {size}")
        lib = library()
        if lib is None:
            products = np.einsum("n,nk->k", values, self._rows[index].astype(np.float32))
            found = products.astype(np.float64) * self._scales - self._offset
            length = np.sqrt((found * found).sum())
            return (found / length).astype(np.float32) if length > _LEAST else out
        index, values = np.ascontiguousarray(index, np.intp), np.ascontiguousarray(values, "f4")
        lib.mora_embed(*self._arrays, _at(index), _at(values), len(index), _at(out))
        return out

    def embed_text(self, text: bytes, weight: Doubles, counting: Counting) -> Floats:
        """A text's features, log(1 + count) at length 1, as ``embed`` does.

        Raises ValueError where there are not as many buckets as rows, and what
        ``count_features`` raises.
        """
        if counting.dim != len(self._rows):
            raise ValueError(f"{counting.dim} buckets for {len(self._rows)} rows")
        lib = library()
        if lib is None:
            return self.embed(*features(count_features(text, weight, counting)))
        _check(text, weight, counting)
        weight, counts = np.ascontiguousarray(weight, np.float64), np.zeros(counting.dim)
        out = np.empty(len(self._scales), np.float32)
        lib.mora_embed_text(
            *(*self._arrays, text, _at(weight), len(text), *_counting(counting)),
            *(_at(counts), _at(out)),
        )
        return out


def features(counts: Doubles) -> tuple[Indices, Floats]:
    """Where counts [dim] are, sorted [n], and log(1 + count) of them at length 1 together [n]."""
    index = np.flatnonzero(counts)
    values = np.log1p(counts[index])
    norm = float(np.sqrt(values @ values)) or 1.0
    return index, (values / norm).astype(np.float32)


def word_hashes(text: bytes) -> Iterator[tuple[int, int, int]]:
    """(start, end, hash) of each word of a text whose words stand apart by spaces."""
    for word in _WORD.finditer(text):
        yield word.start(), word.end(), zlib.crc32(word.group())


def without(text: bytes, weight: Doubles, words: Words) -> bytes:
    """A text with spaces for its words outside quotations whose hashes are in sorted ``words``.

    ``weight`` [len(text)] is below 1 in quotations. b"" where no word outside them is left.
    Raises ValueError for another number of weights.
    """
    _check(text, weight)
    lib = library()
    if lib is None:
        known, left, blank = set(words.tolist()), False, bytearray(text)
        for start, end, hash_ in word_hashes(text):
            if weight[start] < 1:
                continue
            if hash_ in known:
                blank[start:end] = b" " * (end - start)
            else:
                left = True
        return bytes(blank) if left else b""
    data = np.frombuffer(text, np.uint8).copy()
    weight, words = np.ascontiguousarray(weight, np.float64), np.ascontiguousarray(words, np.uint32)
    left = lib.mora_without(_at(data), _at(weight), len(data), _at(words), len(words))
    return data.tobytes() if left else b""


def count_features(text: bytes, weight: Doubles, counting: Counting) -> Doubles:
    """What falls into each of ``dim`` buckets of a text whose words stand apart by spaces.

    Its words with the ``weight`` [len(text)] of their first byte; where ``pairs`` is above 0, as
    much for neighbouring words, quoted words in a row (below weight 1) being one neighbour and
    the text's ends another; the n-grams of ``lengths`` bytes, each 2 or more, with the weight of
    their second byte. An n-gram has no space inside, but may begin and end with one. The same
    bits either way. Raises ValueError for another number of weights, and for shorter n-grams.
    """
    _check(text, weight, counting)
    lib = library()
    if lib is None:
        return _count_features(text, weight, counting)
    weight, counts = np.ascontiguousarray(weight, np.float64), np.zeros(counting.dim)
    lib.mora_features(text, _at(weight), len(text), *_counting(counting), _at(counts))
    return counts


def _check(text: bytes, weight: Doubles, counting: Counting | None = None) -> None:
    """As a compiled loop would read past what is there."""
    if len(weight) != len(text):
        raise ValueError(f"{len(weight)} weights of {len(text)} bytes")
    if counting is not None and (counting.lengths.start < 2 or counting.dim < 1):
        raise ValueError(f"n-grams of {counting.lengths.start} bytes in {counting.dim} buckets")


def _counting(counting: Counting) -> tuple[float, int, int, int]:
    """As the library takes it."""
    return counting.pairs, counting.lengths.start, counting.lengths.stop - 1, counting.dim


def _count_features(text: bytes, weight: Doubles, counting: Counting) -> Doubles:
    pairs, lengths, dim = counting
    words = list(word_hashes(text))
    hashes = np.array([hash_ for _, _, hash_ in words], np.uint64)
    weights = weight[[start for start, _, _ in words]]
    all_hashes, all_weights = [hashes], [weights]
    if pairs > 0 and words:
        near = _neighbours(hashes, weights < 1)
        all_hashes.append(near)
        all_weights.append(np.full(len(near), pairs))
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    space = codes == _SPACE
    rolling, broken = codes, np.zeros(len(codes), bool)
    for n in range(2, lengths.stop):
        rolling = rolling[:-1] * _MIX[0] + codes[n - 1 :]
        broken = broken[:-1] | space[n - 2 : -1] if n > 2 else broken[:-1]
        if n in lengths:
            whole = ~broken
            all_hashes.append(rolling[whole] + np.uint64(n))
            all_weights.append(weight[1 : 1 + len(whole)][whole])
    mixed = np.concatenate(all_hashes)
    mixed = (mixed ^ (mixed >> np.uint64(31))) * _MIX[1]
    buckets = ((mixed >> np.uint64(33)) % np.uint64(dim)).astype(np.intp)
    return np.bincount(buckets, np.concatenate(all_weights), dim).astype(np.float64, copy=False)


def _neighbours(words: Hashes, quoted: np.typing.NDArray[np.bool_]) -> Hashes:
    """Hashes of neighbouring words, from their own."""
    first = np.append(True, ~(quoted[1:] & quoted[:-1]))
    ends = np.array([_END], np.uint64)
    line = np.concatenate((ends, np.where(quoted, np.uint64(_QUOTED), words)[first], ends))
    hashes: Hashes = line[:-1] * _MIX[0] + line[1:]
    return hashes


def sorted_words(hashes: Iterable[int]) -> Words:
    """Hashes of words as ``without`` takes them."""
    return np.array(sorted(hashes), np.uint32)


def _rows(array: np.typing.NDArray[np.generic]) -> Indices:
    """The address of each row of a contiguous array."""
    return array.ctypes.data + array.strides[0] * np.arange(len(array), dtype=np.intp)


def _at(array: Any) -> ctypes.Array[ctypes.c_char] | int:
    """Where a contiguous array is, as the library takes it: ``ctypes.data`` is 4 times slower."""
    try:
        return _BYTE.from_buffer(array)
    except (TypeError, ValueError):  # it cannot be written to, or is empty
        return int(array.ctypes.data)


def _products(rows: Codes, scales: Floats, z: Floats) -> Floats:
    """Rows in 8 bits [n, k] times z [k] in 15, the same bits as compiled: sums of integers."""
    limit = np.float32(min((2**31 - 1) // 128 // len(z), _MOST_CODE))
    most = np.abs(z).max().astype(np.float32)
    factor = limit / most if most > _LEAST else np.float32(0)
    codes = np.rint(z.astype(np.float32) * factor).astype(np.int64)
    sums = rows.astype(np.int64) @ codes
    products: Floats = sums.astype(np.float32) * (most / limit * scales)
    return products
