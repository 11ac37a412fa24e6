"""Vectors in 8 bits: a quarter of the memory at an error of about 1 % of each value."""

from __future__ import annotations

import numpy as np

from mora_serve.router.arrays import Codes, Floats


def to_int8(rows: Floats) -> tuple[Codes, Floats]:
    """Codes [n, k] and scales [n] with rows [n, k] close to codes · scales, row by row."""
    scales = np.abs(rows).max(1) / np.float32(127)
    codes = np.rint(rows / np.where(scales > 0, scales, 1)[:, None])
    return codes.astype(np.int8), scales.astype(np.float32)
