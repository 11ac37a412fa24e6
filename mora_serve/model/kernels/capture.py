"""A CUDA graph of what a function launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(work: Callable[[], object], pool: Any = None, stream: Any = None) -> Any:
    """The graph of ``work``, captured on ``stream`` in the memory of ``pool``.

    Other threads may use the device meanwhile. Where ``work`` does what a capture does not allow,
    what it raises, or the capture's end, comes out; the current stream is then as it was, which
    torch.cuda.graph alone would leave changed.
    """
    graph = torch.cuda.CUDAGraph()
    # Not "global": loads of adapters, on a thread of their own, may allocate meanwhile.
    capture = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
    with torch.cuda.stream(torch.cuda.current_stream()), capture:
        work()
    return graph
