"""From a prompt's features to its vector."""

from __future__ import annotations

import numpy as np

from mora_serve.router import native
from mora_serve.router.arrays import Codes, Doubles, Floats, Indices
from mora_serve.router.counting import Counting, check_weights, count_features, features
from mora_serve.router.native import address


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
        lib = native.library()
        if lib is None:
            products = np.einsum("n,nk->k", values, self._rows[index].astype(np.float32))
            found = products.astype(np.float64) * self._scales - self._offset
            length = np.sqrt((found * found).sum())
            return (found / length).astype(np.float32) if length > native.LEAST else out
        index, values = np.ascontiguousarray(index, np.intp), np.ascontiguousarray(values, "f4")
        lib.mora_embed(
            *self._arrays,
            address(index),
            address(values),
            len(index),
            address(out),
        )
        return out

    def embed_text(self, text: bytes, weight: Doubles, counting: Counting) -> Floats:
        """A text's features, log(1 + count) at length 1, as ``embed`` does.

        Raises ValueError where there are not as many buckets as rows, and what
        ``count_features`` raises.
        """
        if counting.dim != len(self._rows):
            raise ValueError(f"{counting.dim} buckets for {len(self._rows)} rows")
        lib = native.library()
        if lib is None:
            return self.embed(*features(count_features(text, weight, counting)))
        check_weights(text, weight, counting)
        weight, counts = np.ascontiguousarray(weight, np.float64), np.zeros(counting.dim)
        out = np.empty(len(self._scales), np.float32)
        lib.mora_embed_text(
            *(*self._arrays, text, address(weight), len(text), *counting.numbers),
            *(address(counts), address(out)),
        )
        return out
