"""Residual add and norm against torch's own, op by op."""

from __future__ import annotations

import pytest
import torch

from mora_serve.model.kernels.norms import add_norm, add_norm_reference
from tests.model.kernels.compare import DTYPES, assert_close, same_bits


def inputs(rows: int, columns: int, dtype: torch.dtype, device: torch.device):
    g = torch.Generator().manual_seed(rows * columns)
    shapes = {"h": (rows, columns), "delta": (rows, columns), "weight": (columns,)}
    made = {
        name: torch.randn(shape, generator=g).to(device, dtype)
        for name, shape in {**shapes, "bias": (columns,)}.items()
    }
    return made | {"eps": 1e-5, "out": torch.empty(rows, columns, dtype=dtype, device=device)}


def run(function, **given):
    given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    function(**given)
    return given["h"], given["out"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("left_out", [(), ("bias",), ("bias", "delta")], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 100), (2, 1024)])
def test_the_residual_and_the_norm_are_torch_s(rows, columns, left_out, dtype, device):
    given = inputs(rows, columns, dtype, device) | dict.fromkeys(left_out)
    h, out = run(add_norm, **given)
    expected_h, expected_out = run(add_norm_reference, **given)
    assert_close(h, expected_h)
    assert_close(out, expected_out)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_sum_is_rounded_as_torch_rounds_it(dtype, device):
    """Hardly a bit differs."""
    given = inputs(8, 1000, dtype, device)
    h, out = run(add_norm, **given)
    expected_h, expected_out = run(add_norm_reference, **given)
    assert same_bits(h, expected_h)
    assert (out != expected_out).float().mean() < 0.001


def test_without_a_delta_the_residual_stays(device):
    given = inputs(2, 64, torch.float32, device)
    h, _ = run(add_norm, **given | {"delta": None, "bias": None})
    assert same_bits(h, given["h"])


def test_a_row_of_nan_harms_no_other_row(device):
    given = inputs(3, 96, torch.float32, device)
    h, out = run(add_norm, **given)
    given["delta"][1] = float("nan")
    spoilt_h, spoilt_out = run(add_norm, **given)
    assert spoilt_h[1].isnan().all()
    assert spoilt_out[1].isnan().all()
    for row in (0, 2):
        assert same_bits(spoilt_h[row], h[row])
        assert same_bits(spoilt_out[row], out[row])


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [2048, 3584, 4096, 8192, 16384])
def test_the_sizes_of_large_models(columns, device):
    given = inputs(257, columns, torch.bfloat16, device)
    for got, expected in zip(run(add_norm, **given), run(add_norm_reference, **given), strict=True):
        assert_close(got, expected)
