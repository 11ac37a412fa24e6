"""The router's arrays by what they hold, and their lengths."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int8]
Indices = npt.NDArray[np.intp]
Hashes = npt.NDArray[np.uint64]
Words = npt.NDArray[np.uint32]  # hashes of words, sorted
Objects = npt.NDArray[np.object_]  # joined 10 times faster than tuples


def unit(vectors: Floats) -> Floats:
    """Vectors [..., K] divided by their norms; zeros stay zeros."""
    norms = np.sqrt(np.einsum("...k,...k->...", vectors, vectors))[..., None]
    out: Floats = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    return out
