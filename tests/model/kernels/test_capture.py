"""Graphs of what functions launch. Only a card captures."""

from __future__ import annotations

import pytest
import torch

from mora_serve.model.kernels.capture import captured

pytestmark = pytest.mark.gpu


def test_a_replay_computes_what_is_in_the_buffers_now() -> None:
    x, y = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    torch.mul(x, 2, out=y)
    graph = captured(lambda: torch.mul(x, 2, out=y))
    x.fill_(3)
    graph.replay()
    assert y.tolist() == [6, 6, 6, 6]


def test_a_capture_that_fails_leaves_stream_and_allocator_as_they_were() -> None:
    """Memory is shared with graphs of before, so the next one is captured in the same."""
    before, x = torch.cuda.current_stream(), torch.ones(4, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    graph = captured(lambda: x.add_(1), pool)
    with pytest.raises(RuntimeError):
        captured(x.sum().item, pool)  # waits for the device, which a capture does not allow
    assert torch.cuda.current_stream() == before
    assert (x + 1).tolist() == [2, 2, 2, 2]
    next_one = captured(lambda: x.mul_(3), pool)
    graph.replay()
    next_one.replay()
    assert x.tolist() == [6, 6, 6, 6]
