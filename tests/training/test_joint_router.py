"""The router's differentiable gates, their straight-through choice, and the folded correction."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mora_serve.router.format import read_router
from mora_serve.router.router import Router
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import TASKS
from router_training.joint_router import GradedRouter, straight_through
from router_training.router import FitOptions, fit_router
from router_training.router_data import RouterData
from router_training.router_study import projected

NAMES = ("reverse", "uppercase", "roman", "json")


OPTIONS = FitOptions(dims=512, folds=2, correct=False)


@pytest.fixture(scope="module")
def data():
    rng = random.Random(0)
    examples = {name: [p for p, _ in TASKS[name].examples(1, 40)] for name in NAMES}
    return RouterData.of(examples, [out_of_domain(rng) for _ in range(128)])


@pytest.fixture(scope="module")
def content(data):
    return read_router(fit_router(data, options=OPTIONS)[0])[0]


@pytest.fixture(scope="module")
def embedded(content):
    router = Router(content)
    return [
        torch.stack([torch.from_numpy(router.embed(p)) for p, _ in TASKS[name].examples(2, 16)])
        for name in NAMES
    ]


def test_it_starts_as_the_fitted_router(content, embedded):
    """Untrained, prompts and keys are the served router's, and gates open for own prompts only."""
    graded, router = GradedRouter(embedded), Router(content)
    torch.testing.assert_close(graded.embed(embedded[0]), embedded[0])
    for name, key in zip(NAMES, graded.keys().detach(), strict=True):
        served = router.key([p for p, _ in TASKS[name].examples(2, 16)])
        assert served is not None
        np.testing.assert_allclose(key.numpy(), served.centre, atol=1e-4)
    probability = torch.cat([graded.logits(z) for z in embedded]).sigmoid()
    own = torch.arange(len(NAMES)).repeat_interleave(16)
    right = torch.nn.functional.one_hot(own, len(NAMES)).bool()
    assert ((probability > 0.5) == right).float().mean() > 0.9


def test_what_it_learns_moves_its_gates(embedded):
    """Labels the other way round are learned: gates, correction and keys take part."""
    torch.manual_seed(0)
    graded = GradedRouter(embedded)
    z, own = torch.cat(embedded), torch.arange(len(NAMES)).repeat_interleave(16)
    labels = torch.nn.functional.one_hot(own, len(NAMES)).float().flip(1)
    optimizer = torch.optim.Adam(graded.parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(graded.logits(z), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert np.linalg.norm(graded.embed.matrix() - np.eye(z.shape[1])) > 0.1


def test_picks_are_whole_and_gradients_the_probabilities():
    """1 above one half for the best few, 0 elsewhere; d(pick) is d(probability)."""
    logits = torch.tensor([[2.0, -1.0, 3.0, 1.0], [-1.0, -2.0, -3.0, -4.0]], requires_grad=True)
    picked = straight_through(logits, most=2)
    torch.testing.assert_close(picked.detach(), torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]]))
    (gradient,) = torch.autograd.grad(picked.sum(), logits)
    p = logits.detach().sigmoid()
    torch.testing.assert_close(gradient, p * (1 - p))


def test_a_folded_correction_is_what_the_server_computes(content):
    """Prompts by the new file are the old ones under the matrix, to 8 bits' error."""
    torch.manual_seed(0)
    matrix = torch.eye(content.dims) + 0.5 * torch.randn(content.dims, content.dims) / 23
    folded = projected(content, content.projection @ matrix.numpy())
    read, _ = read_router(folded.to_bytes())
    before, after = Router(content), Router(read)
    for name in NAMES:
        for prompt, _ in TASKS[name].examples(3, 4):
            want = torch.from_numpy(before.embed(prompt)) @ matrix
            want /= want.norm()
            assert float(want @ torch.from_numpy(after.embed(prompt))) > 0.999
