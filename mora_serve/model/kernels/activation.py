"""SwiGLU in one launch; the reference is model/passes.py."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mora_serve.model import passes

BLOCK = 1024


def swiglu(gate_up: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """out = silu(gate) * up; gate_up [T, 2 n] has both side by side, out is [T, n].

    Both contiguous and of one type. ``bias`` [2 n] is added to gate_up first. Sum, silu and product
    are each rounded to that type, as torch does it op by op.
    """
    rows, columns = out.shape
    grid = (rows, triton.cdiv(columns, BLOCK))
    _swiglu_kernel[grid](gate_up, bias, out, columns, BLOCK=BLOCK, num_warps=4)


def swiglu_reference(gate_up: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """``swiglu`` by torch, op by op."""
    out.copy_(passes.swiglu(gate_up if bias is None else gate_up + bias))


@triton.jit
def _swiglu_kernel(gate_up, bias, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    kind = out.dtype.element_ty
    base = gate_up + row * columns * 2 + column
    gate = tl.load(base, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        gate += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(bias + columns + column, mask=inside, other=0.0).to(tl.float32)
        gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + row * columns + column, (silu * up).to(kind), mask=inside)
