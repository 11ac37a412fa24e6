"""What the router sees of a prompt: hashed n-grams of its text, and how the base reads it.

The features a router was fitted on are described in its file (``kind``, ``version`` and the
kind's own settings). N-grams need nothing but the text. A pooled hidden state needs the base: it
is computed elsewhere (``mora_serve.model.pooling``) and comes here as an array.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mora_serve.errors import InvalidArgument
from mora_serve.router.arrays import Doubles, Floats, Indices, Words
from mora_serve.router.counting import Counting, count_features, features, without, word_hashes

Pool = Callable[[Sequence[str]], Floats]  # n texts -> pooled hidden states [n, hidden size]

MAX_DIM = 1 << 16
MAX_DEPTH = 1 << 10
MAX_TOKENS = 1 << 11  # a text is read in one pass, beside which streams wait
MAX_WEIGHT = 100.0
_LETTERS = b"0123456789abcdefghijklmnopqrstuvwxyz" + bytes(range(0x80, 0x100))
_TO_SPACE = bytes(c if c in _LETTERS else 0x20 for c in range(256))
_QUOTE = re.compile(rb"(?<=(.))(['\"`])\2*(?=(.))", re.DOTALL)


@dataclass(frozen=True)
class NGrams:
    """Hashed n-grams of bytes (3 to 5) inside words, and words, as L2-normalised log(1 + count).

    Needs no model and no fitted vocabulary. The text is UTF-8 with ASCII letters lowered, so a
    capital at a sentence's start changes nothing; a word is a run of letters, digits or bytes
    beyond ASCII, and its n-grams include the space before and after it. A quoted span counts
    ``quoted`` times: it is the data to work on more often than the instruction. Neighbouring
    words count as ``pairs`` more, a quoted span being one word and the text's ends another:
    "left of" is not "to left".

    A prompt longer than ``max_bytes`` counts by its first and last halves of that length:
    instructions stand at the ends of long prompts, documents in the middle. The hash is fixed
    by this code and ``VERSION``, and independent of platform and process.
    """

    dim: int = 2048
    shortest: int = 3
    longest: int = 5
    max_bytes: int = 4096
    quoted: float = 0.3
    pairs: float = 0.5

    KIND = "ngrams"
    VERSION = 2

    def describe(self) -> dict[str, Any]:
        """The JSON object that ``features_from`` reads back."""
        return {
            "kind": self.KIND,
            "version": self.VERSION,
            "dim": self.dim,
            "shortest": self.shortest,
            "longest": self.longest,
            "max_bytes": self.max_bytes,
            "quoted": float(self.quoted),
            "pairs": float(self.pairs),
        }

    def sparse(self, text: str) -> tuple[Indices, Floats]:
        """Features of one text: distinct sorted indices [n] below ``dim`` and values [n].

        n is 0 for a text without any word or n-gram, such as the empty one.
        """
        return features(count_features(*self.read(text), self.counting))

    def words(self, text: str) -> list[int]:
        """Hashes of a text's words in order, those in quotations left out."""
        data, weight = self.read(text)
        return [hash_ for start, _, hash_ in word_hashes(data) if weight[start] == 1]

    @property
    def counting(self) -> Counting:
        """How the texts that ``read`` gives are counted."""
        return Counting(self.pairs, range(self.shortest, self.longest + 1), self.dim)

    def read(self, text: str, words: Words | None = None) -> tuple[bytes, Doubles]:
        """A text as words apart by spaces, and what each byte counts [bytes].

        Where ``words`` (sorted hashes, see ``words``) are given, without them; and nothing, not
        a byte, where no word outside quotations is left then.
        """
        data, weight = self._weighed(text)
        left = data if words is None else without(data, weight, words)
        return left, weight[: len(left)]

    def _weighed(self, text: str) -> tuple[bytes, Doubles]:
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
        return data.translate(_TO_SPACE), weight

    def dense(self, texts: Sequence[str]) -> Floats:
        """Features of many texts: [len(texts), dim] float32."""
        return Features(self).dense(texts)


@dataclass(frozen=True)
class PooledHidden:
    """How the base reads a prompt: the mean of its residual stream over the prompt's tokens.

    Taken after ``depth`` layers without adapters, 0 being the mean input embedding; ``dim`` is
    the base's hidden size. The tokens are those of the text alone, without special ones and
    without a chat template; of more than ``max_tokens`` the first and last halves count. The
    state is L2-normalised, then multiplied by ``weight``.
    """

    depth: int
    dim: int
    max_tokens: int = 512
    weight: float = 1.0

    KIND = "hidden"
    VERSION = 1

    def describe(self) -> dict[str, Any]:
        """The JSON object that ``features_from`` reads back."""
        return {
            "kind": self.KIND,
            "version": self.VERSION,
            "depth": self.depth,
            "dim": self.dim,
            "max_tokens": self.max_tokens,
            "weight": float(self.weight),
        }

    def values(self, pooled: Floats) -> Floats:
        """Features [..., dim] of pooled states [..., dim].

        Zeros for a state of zeros (a text without tokens) and for one that is not finite.
        Raises InvalidArgument for states of another size.
        """
        if pooled.shape[-1] != self.dim:
            raise InvalidArgument(
                f"pooled: states of {pooled.shape[-1]} numbers, the features have {self.dim}; give "
                "those of the base that the router was fitted for",
                field="pooled",
            )
        # In float64, whose squares neither overflow nor vanish.
        states = pooled.astype(np.float64)
        norms = np.sqrt(np.einsum("...d,...d->...", states, states))[..., None]
        usable = (norms > 0) & np.isfinite(norms)
        out = np.divide(states * self.weight, norms, out=np.zeros_like(states), where=usable)
        features: Floats = out.astype(np.float32)
        return features


@dataclass(frozen=True)
class Features:
    """N-grams, a pooled hidden state, or both side by side, n-grams first."""

    ngrams: NGrams | None
    hidden: PooledHidden | None = None

    KIND = "both"
    VERSION = 1

    def __post_init__(self) -> None:
        if self.ngrams is None and self.hidden is None:
            raise InvalidArgument(
                "features: there are none; give n-grams, a hidden state or both", field="features"
            )

    @property
    def kind(self) -> str:
        """``ngrams``, ``hidden`` or ``both``."""
        kind: str = self.describe()["kind"]
        return kind

    @property
    def dim(self) -> int:
        """Length of a prompt's vector."""
        return (self.ngrams.dim if self.ngrams else 0) + (self.hidden.dim if self.hidden else 0)

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest value that a feature can have."""
        if self.hidden is None:
            return 0.0, 1.0
        return -self.hidden.weight, max(self.hidden.weight, 1.0 if self.ngrams else 0.0)

    def describe(self) -> dict[str, Any]:
        """The JSON object that ``features_from`` reads back; of one part it is the part's own."""
        if self.hidden is None and self.ngrams is not None:
            return self.ngrams.describe()
        if self.ngrams is None and self.hidden is not None:
            return self.hidden.describe()
        parts = {p.KIND: p.describe() for p in (self.ngrams, self.hidden) if p is not None}
        return {"kind": self.KIND, "version": self.VERSION, **parts}

    def sparse(self, text: str, pooled: Floats | None = None) -> tuple[Indices, Floats]:
        """Features of one text: distinct sorted indices [n] below ``dim`` and values [n].

        ``pooled`` [hidden.dim] is the text's state. n is 0 for a text with nothing to go by.
        Raises InvalidArgument where a state is needed and not given.
        """
        index, values = np.zeros(0, np.intp), np.zeros(0, np.float32)
        if self.ngrams is not None:
            index, values = self.ngrams.sparse(text)
        if self.hidden is None:
            return index, values
        state = self.hidden.values(_given(pooled))
        if not state.any():
            return index, values
        start = self.ngrams.dim if self.ngrams else 0
        own = np.arange(start, start + self.hidden.dim)
        return np.concatenate((index, own)), np.concatenate((values, state))

    def dense(self, texts: Sequence[str], pooled: Floats | None = None) -> Floats:
        """Features of many texts: [len(texts), dim] float32; ``pooled`` [len(texts), hidden.dim].

        Raises InvalidArgument where states are needed and not given.
        """
        out = np.zeros((len(texts), self.dim), np.float32)
        states = None if self.hidden is None else _given(pooled)
        for i, text in enumerate(texts):
            index, values = self.sparse(text, None if states is None else states[i])
            out[i, index] = values
        return out


def _given(pooled: Floats | None) -> Floats:
    if pooled is None:
        raise InvalidArgument(
            "pooled: these features need the base's hidden states; give them with the text",
            field="pooled",
        )
    return pooled


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


def features_from(description: Any) -> Features:
    """The features that a router file describes.

    Raises InvalidArgument for a kind or version that this server does not have, or for a
    setting out of range.
    """
    field = "router.features"
    kind = description.get("kind") if isinstance(description, Mapping) else None
    if kind == NGrams.KIND:
        return Features(_ngrams(description, field))
    if kind == PooledHidden.KIND:
        return Features(None, _hidden(description, field))
    both = _versioned(description, Features.KIND, field)
    return Features(
        _ngrams(both.get(NGrams.KIND), f"{field}.{NGrams.KIND}"),
        _hidden(both.get(PooledHidden.KIND), f"{field}.{PooledHidden.KIND}"),
    )


def _ngrams(description: Any, field: str) -> NGrams:
    values = _versioned(description, NGrams.KIND, field)
    shortest = _setting(values, field, "shortest", 2, 8)
    return NGrams(
        dim=_setting(values, field, "dim", 64, MAX_DIM),
        shortest=shortest,
        longest=_setting(values, field, "longest", shortest, 8),
        max_bytes=_setting(values, field, "max_bytes", 64, 1 << 16),
        quoted=_fraction(values, field, "quoted", 1.0),
        pairs=_number(values, field, "pairs", 10.0),
    )


def _hidden(description: Any, field: str) -> PooledHidden:
    values = _versioned(description, PooledHidden.KIND, field)
    return PooledHidden(
        depth=_setting(values, field, "depth", 0, MAX_DEPTH),
        dim=_setting(values, field, "dim", 1, MAX_DIM),
        max_tokens=_setting(values, field, "max_tokens", 2, MAX_TOKENS),
        weight=_fraction(values, field, "weight", MAX_WEIGHT),
    )


_VERSIONS = {part.KIND: part.VERSION for part in (NGrams, PooledHidden, Features)}


def _versioned(description: Any, kind: str, field: str) -> Mapping[str, Any]:
    """A description, if it is one of this kind in the version that this code computes."""
    if not isinstance(description, Mapping):
        raise InvalidArgument(f"{field}: must be a JSON object", field=field)
    given, version = description.get("kind"), description.get("version")
    if given != kind or version != _VERSIONS[kind]:
        known = ", ".join(f"{name!r} version {number}" for name, number in _VERSIONS.items())
        raise InvalidArgument(
            f"{field}: kind {str(given)[:40]!r} version {str(version)[:40]!r} is not supported; "
            f"fit the router on one of {known}",
            field=field,
        )
    return description


def _setting(values: Mapping[str, Any], field: str, key: str, low: int, high: int) -> int:
    value = values.get(key)
    if type(value) is not int or not low <= value <= high:
        raise InvalidArgument(
            f"{field}.{key}: must be an integer from {low} to {high}", field=f"{field}.{key}"
        )
    return value


def _fraction(values: Mapping[str, Any], field: str, key: str, most: float) -> float:
    value = _number(values, field, key, most)
    if value == 0.0:
        raise InvalidArgument(f"{field}.{key}: must be above 0", field=f"{field}.{key}")
    return value


def _number(values: Mapping[str, Any], field: str, key: str, most: float) -> float:
    value = values.get(key)
    if type(value) is not float or not 0.0 <= value <= most:
        raise InvalidArgument(
            f"{field}.{key}: must be a number from 0 to {most:g}", field=f"{field}.{key}"
        )
    return value
