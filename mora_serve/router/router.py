"""The router: a prompt becomes a vector and an adapter a key."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mora_serve.errors import FailedPrecondition
from mora_serve.router.arrays import Floats, Words, unit
from mora_serve.router.features import PooledHidden
from mora_serve.router.format import RouterFile, read_router
from mora_serve.router.projection import Projection
from mora_serve.router.prototypes import prototypes

MAX_WORDS = 1024  # of a key, the commonest
_SAME = 1e-2  # what is left of a unit vector that others span


@dataclass(frozen=True, eq=False)
class AdapterKey:
    """What the router keeps of one adapter.

    ``centre`` [K] is the mean direction of its example prompts, ``prototypes`` [P, K] a few of
    their directions; all are unit vectors. ``words`` are hashes of the words that the prompts
    use, those in quotations left out.
    """

    centre: Floats
    prototypes: Floats
    words: frozenset[int] = frozenset()


def beside(z: Floats, known: Floats) -> Floats:
    """What is left of z [K] without what the vectors ``known`` [P, K] span: [K], or zeros."""
    axes: list[Floats] = []
    for row in known:
        new = _less(axes, row)
        if np.einsum("k,k->", new, new) > _SAME**2:
            axes.append(unit(new))
    return unit(_less(axes, z))


def _less(axes: Iterable[Floats], vector: Floats) -> Floats:
    """A vector [K] without its parts along orthogonal unit vectors."""
    for axis in axes:
        vector = vector - np.einsum("k,k->", vector, axis) * axis
    return vector


class Router:
    """A fitted router; immutable, so any thread may use it.

    ``digest`` is the hex SHA-256 of its file.
    """

    def __init__(self, content: RouterFile, digest: str = "") -> None:
        self.content = content
        self.digest = digest
        self.calibration = content.calibration
        self._projection = Projection(content.codes.T, content.scales, content.mean)
        self._ngrams = content.features.ngrams
        self._of_ngrams = self._projection.part(self._ngrams.dim) if self._ngrams else None

    @classmethod
    def load(cls, data: bytes, fingerprint: str = "") -> Router:
        """Read a router's file for the base of the given fingerprint.

        Raises InvalidArgument for a file that is not sound, and FailedPrecondition for a router
        that was fitted for another base, or on hidden states without saying of which base.
        """
        content, digest = read_router(data)
        if content.features.hidden is not None and not content.fingerprint:
            raise FailedPrecondition(
                "router: it was fitted on hidden states, but does not say of which base; fit it "
                "again with the base's fingerprint",
                field="router.fingerprint",
                reason="NO_BASE",
            )
        if content.fingerprint and fingerprint and content.fingerprint != fingerprint:
            raise FailedPrecondition(
                f"router: it was fitted for base {content.fingerprint}, this server runs "
                f"{fingerprint}; load a router fitted for this base",
                field="router.fingerprint",
                reason="WRONG_BASE",
            )
        return cls(content, digest)

    @property
    def dims(self) -> int:
        """K, the length of embedded prompts and keys."""
        return self.content.dims

    @property
    def hidden(self) -> PooledHidden | None:
        """The hidden state that prompts have to come with, or None."""
        return self.content.features.hidden

    def embed(self, text: str, pooled: Floats | None = None) -> Floats:
        """A prompt as a unit vector [K]; zeros for a text without a single feature.

        ``pooled`` [hidden size] is the prompt's state where ``hidden`` asks for one. Sums rows
        instead of calling BLAS: no thread pool to wait for, and the same bits whatever else is
        embedded. Raises InvalidArgument for a state that is missing or of another size.
        """
        if self.hidden is None:
            return self._embed_text(text)
        return self._projection.embed(*self.content.features.sparse(text, pooled))

    @property
    def reads_words(self) -> bool:
        """Whether ``rest`` can work: the router is on n-grams, alone or beside states."""
        return self._ngrams is not None

    def rest(self, text: str, words: Words) -> Floats:
        """What is left of a prompt without an adapter's ``words`` (sorted hashes): [K], or zeros.

        By its n-grams, hidden states left out. Raises ValueError unless ``reads_words``.
        """
        return self._embed_text(text, words)

    def _embed_text(self, text: str, words: Words | None = None) -> Floats:
        if self._ngrams is None or self._of_ngrams is None:
            raise ValueError("the router has no n-grams")
        data, weight = self._ngrams.read(text, words)
        return self._of_ngrams.embed_text(data, weight, self._ngrams.counting)

    def key(
        self, prompts: Iterable[str], pooled: Iterable[Floats] | None = None
    ) -> AdapterKey | None:
        """The key of an adapter that answers these prompts, whatever their order.

        ``pooled`` are their states, as for ``embed``. None where no prompt has a feature to go
        by. Raises what ``embed`` raises.
        """
        texts = list(prompts)
        states = [None] * len(texts) if pooled is None else list(pooled)
        by_text = dict(zip(texts, states, strict=True))
        embedded = [self.embed(text, by_text[text]) for text in sorted(by_text)]
        embedded = [z for z in embedded if z.any()]
        return self.key_of(np.stack(embedded), self._words(texts)) if embedded else None

    def _words(self, texts: Iterable[str]) -> frozenset[int]:
        if self._ngrams is None:
            return frozenset()
        found = Counter(word for text in set(texts) for word in set(self._ngrams.words(text)))
        return frozenset(heapq.nsmallest(MAX_WORDS, found, key=lambda w: (-found[w], w)))

    def key_of(self, embedded: Floats, words: frozenset[int] = frozenset()) -> AdapterKey:
        """The key of an adapter from its embedded prompts [n, K], n at least 1, and its words."""
        found = prototypes(embedded, self.content.prototypes)
        return AdapterKey(unit(embedded.sum(0)), found, words)
