"""What the kernels share: the type in which tl.dot multiplies."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which tl.dot multiplies numbers of ``dtype``: their own.

    Triton's interpreter cannot multiply bfloat16 and gets float32, in which the products of two
    bfloat16 numbers are exact, as they are on a card.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
