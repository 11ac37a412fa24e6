"""The router's inner loops: compiled where there was a compiler, else in numpy.

Each is a few microseconds of work, so the compiled ones keep Python's lock: to get it back beside
a busy thread would take longer. Sums may differ between the two ways by their rounding; with
either, a row's sum has the same bits whatever is beside it, which no BLAS promises.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from ctypes import c_int, c_void_p
from functools import cache

import numpy as np

from mora_serve.router.arrays import Codes, Doubles, Floats, Hashes, Indices

VERSION = 1  # native.c's
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))
_SPACE = 0x20


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
    lib.mora_int8_products.argtypes = [c_void_p, c_int, c_void_p, c_int, c_void_p]
    lib.mora_weighted_sum.argtypes = [*[c_void_p] * 3, c_int, c_int, c_void_p]
    lib.mora_count_ngrams.argtypes = [
        *(c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_int, c_int, c_int, c_int, c_void_p)
    ]
    for function in (lib.mora_int8_products, lib.mora_weighted_sum, lib.mora_count_ngrams):
        function.restype = None
    return lib


class Stacked:
    """Rows of codes [n, k] of several arrays, one after another, read where they are."""

    def __init__(self, parts: Sequence[Codes]) -> None:
        """One part or more, all with as many numbers a row."""
        # kept: what the addresses lead to
        self._parts = [np.ascontiguousarray(p, np.int8) for p in parts]
        self._width = min(p.shape[1] for p in parts)
        self._addresses = np.concatenate(
            [p.ctypes.data + p.strides[0] * np.arange(len(p), dtype=np.intp) for p in self._parts]
        )

    @property
    def nbytes(self) -> int:
        """Memory besides the parts."""
        return self._addresses.nbytes

    def products(self, z: Floats, rows: Indices | None = None) -> Floats:
        """Times z [at most k], as far as it goes -> [n]; of some rows alone where given.

        Raises ValueError for a longer z: a compiled loop would read past the rows.
        """
        if len(z) > self._width:
            raise ValueError(f"{len(z)} numbers for rows of {self._width}")
        lib = library()
        if lib is None:
            codes = np.concatenate([p[:, : len(z)] for p in self._parts])
            chosen = codes if rows is None else codes[rows]
            products: Floats = np.einsum("nk,k->n", chosen.astype(np.float32), z)
            return products
        z = np.ascontiguousarray(z, np.float32)
        at = self._addresses if rows is None else self._addresses[rows]
        out = np.empty(len(at), np.float32)
        lib.mora_int8_products(at.ctypes.data, len(at), z.ctypes.data, len(z), out.ctypes.data)
        return out


def int8_products(codes: Codes, z: Floats) -> Floats:
    """codes [n, k] times z [k] -> [n]."""
    return Stacked([codes]).products(z)


def weighted_sum(rows: Floats, index: Indices, values: Floats) -> Floats:
    """The sum of values[i] * rows[index[i]] -> [k], of rows [n, k].

    Raises IndexError for an index that is not below n, as the compiled loop cannot.
    """
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(rows):
        raise IndexError(f"indices up to {int(index.max())} for {len(rows)} rows")
    lib = library()
    if lib is None or not rows.flags.c_contiguous:
        found: Floats = np.einsum("n,nk->k", values, rows[index])
        return found
    index, values = np.ascontiguousarray(index, np.intp), np.ascontiguousarray(values, np.float32)
    out = np.empty(rows.shape[1], np.float32)
    lib.mora_weighted_sum(
        *(rows.ctypes.data, index.ctypes.data, values.ctypes.data),
        *(len(index), rows.shape[1], out.ctypes.data),
    )
    return out


def count_ngrams(
    hashes: Hashes, weights: Doubles, text: bytes, weight: Doubles, lengths: range, dim: int
) -> Doubles:
    """What falls into each of ``dim`` buckets: the hashes with their weights [n], and the n-grams
    of ``lengths`` bytes of the text with the ``weight`` [len(text)] of their second byte.

    An n-gram has no space inside, but may begin and end with one. The same bits either way.
    """
    lib = library()
    if lib is None:
        return _count_ngrams(hashes, weights, text, weight, lengths, dim)
    hashes = np.ascontiguousarray(hashes, np.uint64)
    weights, weight = (np.ascontiguousarray(w, np.float64) for w in (weights, weight))
    counts = np.zeros(dim)
    lib.mora_count_ngrams(
        *(hashes.ctypes.data, weights.ctypes.data, len(hashes), text, weight.ctypes.data),
        *(len(text), lengths.start, lengths.stop - 1, dim, counts.ctypes.data),
    )
    return counts


def _count_ngrams(
    hashes: Hashes, weights: Doubles, text: bytes, weight: Doubles, lengths: range, dim: int
) -> Doubles:
    codes = np.frombuffer(text, np.uint8).astype(np.uint64)
    space = codes == _SPACE
    all_hashes, all_weights = [hashes], [weights]
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
