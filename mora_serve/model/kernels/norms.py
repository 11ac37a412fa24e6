"""Residual add and RMSNorm in one launch; the reference is model/passes.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mora_serve.model.passes import rms_norm


def add_norm(
    h: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    bias: Tensor | None = None,
) -> None:
    """h += delta + bias, in place, then out = RMSNorm(h) * weight.

    h, delta and out [T, n], contiguous, of one type; weight and bias [n]. Without ``delta`` h stays
    as it is, and there is no bias. Each sum is rounded to h's type, as torch does it op by op.
    """
    rows, columns = h.shape
    block = triton.next_power_of_2(columns)
    _add_norm_kernel[(rows,)](
        h,
        delta,
        bias,
        weight,
        out,
        columns,
        eps,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )


def add_norm_reference(
    h: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    bias: Tensor | None = None,
) -> None:
    """``add_norm`` by torch, op by op."""
    if delta is not None:
        h += delta if bias is None else delta + bias
    out.copy_(rms_norm(h, weight, eps))


@triton.jit
def _add_norm_kernel(h, delta, bias, weight, out, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(h + row + column, mask=inside, other=0.0)
    if delta is not None:
        added = tl.load(delta + row + column, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            added += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            added = added.to(h.dtype.element_ty).to(tl.float32)
        x = (x.to(tl.float32) + added).to(h.dtype.element_ty)
        tl.store(h + row + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / columns + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, (wide * scale * w).to(out.dtype.element_ty), mask=inside)
