"""Norm, rotation and SwiGLU: the gradients written by hand are autograd's."""

from __future__ import annotations

import pytest
import torch

from mora_serve.model.passes import rms_norm, rotate, swiglu

N = 8


def formulas():
    torch.manual_seed(0)
    weight = torch.randn(N, dtype=torch.float64)
    cos, sin = (torch.randn(5, 1, N // 2, dtype=torch.float64).repeat(1, 1, 2) for _ in range(2))

    def turned(x):
        a, b = x.chunk(2, -1)
        c, s = cos[..., : N // 2], sin[..., : N // 2]
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    def dressed(x):
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    return {
        "norm": (
            lambda x: rms_norm(x, weight, 1e-5),
            lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight,
        ),
        "rotation": (lambda x: rotate(x, cos, sin), turned),
        "swiglu": (swiglu, dressed),
    }


@pytest.mark.parametrize("name", ["norm", "rotation", "swiglu"])
def test_values_and_gradients_are_those_of_the_formula(name):
    """With and without gradients, over rows and heads."""
    ours, formula = formulas()[name]
    x = torch.randn(5, 3, N, dtype=torch.float64)
    torch.testing.assert_close(ours(x), formula(x), rtol=1e-6, atol=1e-6)
    x.requires_grad_()
    torch.testing.assert_close(ours(x), formula(x), rtol=1e-6, atol=1e-6)
    mine, theirs = (torch.autograd.grad(f(x).sin().sum(), x)[0] for f in (ours, formula))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_values_do_not_depend_on_gradients():
    """What is trained is what is served: both forms agree to rounding in float32."""
    for ours, _ in formulas().values():
        x = torch.randn(5, 3, N)
        trained = ours(x.clone().requires_grad_())
        torch.testing.assert_close(trained.float(), ours(x).float())


def test_an_input_that_others_use_keeps_its_numbers():
    """The gradients are computed beside what they come from, not in its place."""
    for ours, _ in formulas().values():
        x = torch.randn(5, 3, N, dtype=torch.float64, requires_grad=True)
        out = ours(x)
        above = torch.ones_like(out)
        before = x.detach().clone()
        out.backward(above)
        assert torch.equal(x.detach(), before)
        assert torch.equal(above, torch.ones_like(out))
