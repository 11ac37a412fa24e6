"""How close a kernel must come to its reference."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the largest magnitude of a row: in 16 bits one unit in its last place.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = tuple(TOLERANCE)


def assert_close(actual: Tensor, reference: Tensor, steps: int = 1) -> None:
    """Equal up to ``steps`` roundings of the type, NaN where the reference has NaN."""
    assert actual.dtype == reference.dtype
    assert actual.shape == reference.shape
    expected = reference.double()
    scale = expected.nan_to_num(0.0).abs().amax(-1, keepdim=True)
    limit = steps * TOLERANCE[reference.dtype] * scale + 1e-30
    error = (actual.double() - expected).abs()
    assert torch.equal(actual.isnan(), reference.isnan())
    assert bool(((error <= limit) | expected.isnan()).all()), float(
        (error / limit).nan_to_num().max()
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, bit by bit."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
