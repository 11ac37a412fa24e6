"""Muon: orthogonal updates, alone or stacked."""

from __future__ import annotations

import pytest
import torch

from router_training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_updates_are_nearly_orthogonal(shape):
    """All singular values come close to one, and the directions stay."""
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalise(stack)
    values = torch.linalg.svdvals(out)
    assert values.max() < 1.4
    assert values.median() > 0.6
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    assert ((out * (u @ v)).sum((1, 2)) / (out.norm(dim=(1, 2)) * min(shape) ** 0.5)).min() > 0.9


def test_a_stack_is_its_matrices():
    """Matrices of one shape are updated as if each were alone."""
    stack = torch.randn(4, 12, 6, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([orthogonalise(m[None]) for m in stack])
    torch.testing.assert_close(orthogonalise(stack), alone, rtol=1e-4, atol=1e-5)


def test_steps_match_torch():
    """A few steps on changing gradients equal torch's own Muon, up to its bfloat16."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 16)) for _ in range(2))
    a = Muon([ours], lr=0.05, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon([theirs], lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(6):
        ours.grad = theirs.grad = torch.randn(24, 16, generator=generator)
        a.step()
        b.step()
    assert (ours - theirs).norm() < 0.03 * (theirs - 1).norm()
