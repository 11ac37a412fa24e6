"""What a text is counted into: its words, neighbouring words and n-grams, by their hashes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mora_serve.router import native
from mora_serve.router.arrays import Doubles, Floats, Hashes, Indices, Words
from mora_serve.router.native import address

_WORD = re.compile(rb"[^ ]+")
_SPACE = 0x20
_QUOTED, _END = 1 << 40, 1 << 41  # beyond the hash of any word
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))


class Counting(NamedTuple):
    """How the features of a text are counted; see ``count_features``."""

    pairs: float
    lengths: range
    dim: int

    @property
    def numbers(self) -> tuple[float, int, int, int]:
        """As the library takes them."""
        return self.pairs, self.lengths.start, self.lengths.stop - 1, self.dim


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
    check_weights(text, weight)
    lib = native.library()
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
    left = lib.mora_without(address(data), address(weight), len(data), address(words), len(words))
    return data.tobytes() if left else b""


def count_features(text: bytes, weight: Doubles, counting: Counting) -> Doubles:
    """What falls into each of ``dim`` buckets of a text whose words stand apart by spaces.

    Its words with the ``weight`` [len(text)] of their first byte; where ``pairs`` is above 0, as
    much for neighbouring words, quoted words in a row (below weight 1) being one neighbour and
    the text's ends another; the n-grams of ``lengths`` bytes, each 2 or more, with the weight of
    their second byte. An n-gram has no space inside, but may begin and end with one. The same
    bits either way. Raises ValueError for another number of weights, and for shorter n-grams.
    """
    check_weights(text, weight, counting)
    lib = native.library()
    if lib is None:
        return _count_features(text, weight, counting)
    weight, counts = np.ascontiguousarray(weight, np.float64), np.zeros(counting.dim)
    lib.mora_features(text, address(weight), len(text), *counting.numbers, address(counts))
    return counts


def check_weights(text: bytes, weight: Doubles, counting: Counting | None = None) -> None:
    """Raise ValueError for numbers that a compiled loop would read past, or divide by."""
    if len(weight) != len(text):
        raise ValueError(f"{len(weight)} weights of {len(text)} bytes")
    if counting is not None and (counting.lengths.start < 2 or counting.dim < 1):
        raise ValueError(f"n-grams of {counting.lengths.start} bytes in {counting.dim} buckets")


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


def _neighbours(words: Hashes, quoted: npt.NDArray[np.bool_]) -> Hashes:
    """Hashes of neighbouring words, from their own."""
    first = np.append(True, ~(quoted[1:] & quoted[:-1]))
    ends = np.array([_END], np.uint64)
    line = np.concatenate((ends, np.where(quoted, np.uint64(_QUOTED), words)[first], ends))
    hashes: Hashes = line[:-1] * _MIX[0] + line[1:]
    return hashes


def sorted_words(hashes: Iterable[int]) -> Words:
    """Hashes of words as ``without`` takes them."""
    return np.array(sorted(hashes), np.uint32)
