"""The router: a prompt becomes a vector, an adapter a key, and their cosine a decision."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mora_serve.errors import FailedPrecondition
from mora_serve.router.features import Floats
from mora_serve.router.format import RouterFile, read_router

PRIOR_PROMPTS = 4.0  # how many prompts of its own outweigh the fitted coherence
_LEAST_SPREAD = 0.02  # between an impostor's and an own prompt's score


@dataclass(frozen=True, eq=False)
class AdapterKey:
    """What the router keeps of one adapter.

    ``prototype`` [K] is a unit vector. ``impostor_mean`` and ``impostor_std`` are of its cosines
    with the router's impostors, the latter at least a random direction's, 1/√K: a smaller one
    would make the score of a known adapter large for anything unforeseen. ``own`` is the cosine
    expected of a prompt that is its own.
    """

    prototype: Floats
    impostor_mean: float
    impostor_std: float
    own: float


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
        self._impostors = unit(content.impostors)

    @classmethod
    def load(cls, data: bytes, fingerprint: str = "") -> Router:
        """Read a router's file for the base of the given fingerprint.

        Raises InvalidArgument for a file that is not sound, and FailedPrecondition for a router
        that was fitted for another base.
        """
        content, digest = read_router(data)
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

    def embed(self, text: str) -> Floats:
        """A prompt as a unit vector [K]; zeros for a text without a single feature.

        Sums rows instead of calling BLAS: no thread pool to wait for, and the same bits
        whatever else is embedded.
        """
        index, values = self.content.features.sparse(text)
        if not len(index):
            return np.zeros(self.dims, np.float32)
        rows = self._projection[index]
        return unit(np.einsum("n,nk->k", values, rows) - self._offset)

    def key(self, prompts: Iterable[str]) -> AdapterKey | None:
        """The key of an adapter that answers these prompts, whatever their order.

        None where no prompt has a feature to go by.
        """
        embedded = [self.embed(text) for text in sorted(set(prompts))]
        embedded = [z for z in embedded if z.any()]
        return self.key_of(np.stack(embedded)) if embedded else None

    def key_of(self, embedded: Floats) -> AdapterKey:
        """The key of an adapter from its embedded prompts [n, K], n at least 1.

        ``own`` follows one rule for every adapter: the mean of its prompts' leave-one-out
        cosines, drawn towards what the fitted coherence predicts for n prompts by the weight
        of ``PRIOR_PROMPTS`` prompts.
        """
        n = len(embedded)
        total = embedded.sum(0, dtype=np.float64)
        prototype = unit(total.astype(np.float32))
        coherence = self.calibration.coherence
        expected = coherence * math.sqrt(n / (1 + (n - 1) * coherence))
        own = expected
        if n > 1:
            left_out = unit((total - embedded).astype(np.float32))
            mean = float(np.einsum("nk,nk->n", left_out, embedded).mean())
            own = (n * mean + PRIOR_PROMPTS * expected) / (n + PRIOR_PROMPTS)
        scores = np.einsum("nk,k->n", self._impostors, prototype)
        low = float(scores.mean())
        return AdapterKey(
            prototype=prototype,
            impostor_mean=low,
            impostor_std=max(float(scores.std()), self.dims**-0.5),
            own=max(own, low + _LEAST_SPREAD),
        )


def unit(vectors: Floats) -> Floats:
    """Vectors [..., K] divided by their norms; zeros stay zeros."""
    norms = np.sqrt(np.einsum("...k,...k->...", vectors, vectors))[..., None]
    out: Floats = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return out
