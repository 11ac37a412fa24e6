"""What the router sees of a prompt: a sparse, L2-normalised vector.

The features a router was fitted on are described in its file (``kind``, ``version`` and the
kind's own settings), so that another kind, such as a pooled hidden state, can be added without
a change to the files that exist.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mora_serve.errors import InvalidArgument

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]

MAX_DIM = 1 << 16
_LETTERS = b"0123456789abcdefghijklmnopqrstuvwxyz" + bytes(range(0x80, 0x100))
_TO_SPACE = bytes(c if c in _LETTERS else 0x20 for c in range(256))
_WORD = re.compile(rb"[^ ]+")
_QUOTE = re.compile(rb"(?<=(.))(['\"`])\2*(?=(.))", re.DOTALL)
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))


@dataclass(frozen=True)
class NGrams:
    """Hashed n-grams of bytes (3 to 5) inside words, and words, as L2-normalised log(1 + count).

    Needs no model and no fitted vocabulary. The text is UTF-8 with ASCII letters lowered, so a
    capital at a sentence's start changes nothing; a word is a run of letters, digits or bytes
    beyond ASCII, and its n-grams include the space before and after it. A quoted span counts
    ``quoted`` times: it is the data to work on more often than the instruction.

    A prompt longer than ``max_bytes`` counts by its first and last halves of that length:
    instructions stand at the ends of long prompts, documents in the middle. The hash is fixed
    by this code and ``VERSION``, and independent of platform and process.
    """

    dim: int = 2048
    shortest: int = 3
    longest: int = 5
    max_bytes: int = 4096
    quoted: float = 0.3

    KIND = "ngrams"
    VERSION = 1

    def describe(self) -> dict[str, Any]:
        """The JSON object that ``features_from`` reads back."""
        return {
            "kind": self.KIND,
            "version": self.VERSION,
            "dim": self.dim,
            "shortest": self.shortest,
            "longest": self.longest,
            "max_bytes": self.max_bytes,
            "quoted": self.quoted,
        }

    def sparse(self, text: str) -> tuple[Indices, Floats]:
        """Features of one text: distinct sorted indices [n] below ``dim`` and values [n].

        n is 0 for a text without any word or n-gram, such as the empty one.
        """
        half = self.max_bytes // 2
        if len(text) > self.max_bytes:
            text = f"{text[:half]} {text[-half:]}"
        data = text.encode("utf-8", "replace").lower()
        if len(data) > self.max_bytes:
            data = data[:half] + b" " + data[-half:]
        data = b" " + data + b" "
        weight = np.ones(len(data))
        for start, end in _quoted_spans(data):
            weight[start:end] = self.quoted
        data = data.translate(_TO_SPACE)
        words = list(_WORD.finditer(data))
        codes = np.frombuffer(data, np.uint8).astype(np.uint64)
        space = codes == 0x20
        hashes = [np.fromiter((zlib.crc32(w.group()) for w in words), np.uint64, len(words))]
        weights = [weight[[w.start() for w in words]]]
        rolling, broken = codes, np.zeros(len(codes), bool)
        for n in range(2, self.longest + 1):
            rolling = rolling[:-1] * _MIX[0] + codes[n - 1 :]
            broken = broken[:-1] | space[n - 2 : -1] if n > 2 else broken[:-1]
            if n >= self.shortest:
                whole = ~broken
                hashes.append(rolling[whole] + np.uint64(n))
                weights.append(weight[1 : 1 + len(whole)][whole])
        mixed = np.concatenate(hashes)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * _MIX[1]
        buckets = ((mixed >> np.uint64(33)) % np.uint64(self.dim)).astype(np.intp)
        counts = np.bincount(buckets, np.concatenate(weights), self.dim)
        index = np.flatnonzero(counts)
        values = np.log1p(counts[index])
        norm = float(np.sqrt(values @ values)) or 1.0
        return index, (values / norm).astype(np.float32)

    def dense(self, texts: list[str]) -> Floats:
        """Features of many texts: [len(texts), dim] float32."""
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(out, texts, strict=True):
            index, values = self.sparse(text)
            row[index] = values
        return out


def _quoted_spans(data: bytes) -> Iterator[tuple[int, int]]:
    """Where quotations start and end; an apostrophe inside a word neither opens nor closes one."""
    opened: dict[bytes, int] = {}
    for mark in _QUOTE.finditer(data):
        before, quote, after = mark.groups()
        if quote in opened and not before.isspace() and after not in _LETTERS:
            yield opened[quote], mark.end()
            opened.clear()
        elif before not in _LETTERS and not after.isspace():
            opened[quote] = mark.start()


def features_from(description: Any) -> NGrams:
    """The features that a router file describes.

    Raises InvalidArgument for a kind or version that this server does not have, or for a
    setting out of range.
    """
    if not isinstance(description, Mapping):
        raise InvalidArgument("router.features: must be a JSON object", field="router.features")
    kind, version = description.get("kind"), description.get("version")
    if kind != NGrams.KIND or version != NGrams.VERSION:
        raise InvalidArgument(
            f"router.features: kind {str(kind)[:40]!r} version {str(version)[:40]!r} is not "
            f"supported; fit the router on {NGrams.KIND!r} version {NGrams.VERSION}",
            field="router.features",
        )
    dim = _setting(description, "dim", 64, MAX_DIM)
    shortest = _setting(description, "shortest", 2, 8)
    longest = _setting(description, "longest", shortest, 8)
    max_bytes = _setting(description, "max_bytes", 64, 1 << 16)
    quoted = description.get("quoted")
    if type(quoted) is not float or not 0.0 < quoted <= 1.0:
        raise InvalidArgument(
            "router.features.quoted: must be a number above 0 and at most 1",
            field="router.features.quoted",
        )
    return NGrams(dim, shortest, longest, max_bytes, quoted)


def _setting(description: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = description.get(key)
    if type(value) is not int or not low <= value <= high:
        raise InvalidArgument(
            f"router.features.{key}: must be an integer from {low} to {high}",
            field=f"router.features.{key}",
        )
    return value
