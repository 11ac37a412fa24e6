"""The router: a prompt becomes a vector and an adapter a key."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mora_serve.errors import FailedPrecondition
from mora_serve.router.arrays import Floats, Words
from mora_serve.router.features import PooledHidden
from mora_serve.router.format import RouterFile, read_router
from mora_serve.router.native import weighted_sum
from mora_serve.router.prototypes import prototypes, unit

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


def _beside(axes: Iterable[Floats], vector: Floats) -> Floats:
    """A vector [K] without what orthogonal unit vectors span."""
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
        self._projection = content.projection
        self._offset = content.mean @ self._projection
        self._ngrams = content.features.ngrams
        size = self._ngrams.dim if self._ngrams else 0
        self._ngrams_offset = content.mean[:size] @ self._projection[:size]

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
        index, values = self.content.features.sparse(text, pooled)
        if not len(index):
            return np.zeros(self.dims, np.float32)
        return unit(weighted_sum(self._projection, index, values) - self._offset)

    def rest(self, text: str, z: Floats, words: Words, known: Floats) -> Floats:
        """What is left of an embedded prompt once an adapter has taken its part: [K], or zeros.

        By n-grams, the text without the ``words`` (sorted hashes) of that adapter's examples,
        hidden states left out; of a router without n-grams, z without what the adapter's
        prototypes span (``known`` [P, K]).
        """
        if self._ngrams is None:
            axes: list[Floats] = []
            for row in known:
                new = _beside(axes, row)
                if np.einsum("k,k->", new, new) > _SAME**2:
                    axes.append(unit(new))
            return unit(_beside(axes, z))
        index, values = self._ngrams.sparse(text, words)
        if not len(index):
            return np.zeros(self.dims, np.float32)
        left = weighted_sum(self._projection, index, values)
        return unit(left - self._ngrams_offset)

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
