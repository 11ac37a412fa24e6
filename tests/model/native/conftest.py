"""Every instruction set that this processor has, each with a few threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from mora_serve.model.native.library import Native, targets

TARGETS = [(dtype, name) for dtype in (torch.float32, torch.bfloat16) for name in targets(dtype)]


@pytest.fixture(
    scope="session",
    params=TARGETS or [pytest.param(None, marks=pytest.mark.skip("no compiler built the library"))],
    ids=lambda p: p and p[1],
)
def team(request: pytest.FixtureRequest) -> Callable[[int], Native]:
    """Makes one team of a target by its number of threads."""
    dtype, name = request.param
    return cache(lambda threads: Native(dtype, threads, name))
