"""Vectors in 8 bits: a quarter of the memory at an error of about 1 % of each value."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mora_serve.router.features import Floats

Codes = npt.NDArray[np.int8]


def to_int8(rows: Floats) -> tuple[Codes, Floats]:
    """Codes [n, k] and scales [n] with rows [n, k] close to codes · scales, row by row."""
    scales = np.abs(rows).max(1) / np.float32(127)
    codes = np.rint(rows / np.where(scales > 0, scales, 1)[:, None])
    return codes.astype(np.int8), scales.astype(np.float32)
