"""SwiGLU against torch's own, op by op."""

from __future__ import annotations

import pytest
import torch

from mora_serve.model.kernels.activation import swiglu, swiglu_reference
from tests.model.kernels.compare import DTYPES, assert_close, same_bits


def run(function, rows: int, columns: int, dtype: torch.dtype, device, biased: bool):
    g = torch.Generator().manual_seed(rows * columns)
    gate_up = (4 * torch.randn(rows, 2 * columns, generator=g)).to(device, dtype)
    bias = torch.randn(2 * columns, generator=g).to(device, dtype) if biased else None
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    function(gate_up, out, bias)
    return out


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 150), (2, 1025)])
def test_swiglu_is_torch_s(rows, columns, dtype, biased, device):
    given = (rows, columns, dtype, device, biased)
    assert_close(run(swiglu, *given), run(swiglu_reference, *given))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_silu_and_product_are_rounded_as_torch_rounds_them(dtype, device):
    """Hardly a bit differs."""
    given = (4, 300, dtype, device, True)
    got, expected = run(swiglu, *given), run(swiglu_reference, *given)
    assert (got != expected).float().mean() < 0.001


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_large_gates_stay_finite(device):
    """exp(-gate) overflows float32 at -89, where silu is 0."""
    gate_up = torch.tensor([[-1e4, -100.0, 100.0, 2.0, 3.0, 4.0]], device=device)
    out = torch.empty(1, 3, device=device)
    swiglu(gate_up, out)
    assert same_bits(out + 0.0, torch.tensor([[0.0, 0.0, 400.0]], device=device))


@pytest.mark.gpu
def test_the_size_of_a_large_model(device):
    given = (300, 14336, torch.bfloat16, device, False)
    assert_close(run(swiglu, *given), run(swiglu_reference, *given))
