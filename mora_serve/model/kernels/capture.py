"""A CUDA graph of what a function launches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch


def captured(work: Callable[[], object], pool: Any = None, stream: Any = None) -> Any:
    """The graph of ``work``, captured on ``stream`` in the memory of ``pool``.

    Other threads may use the device meanwhile. Where ``work`` does what a capture does not allow,
    what it raises, or the capture's end, comes out; the current stream and the allocator are then
    as they were, which torch.cuda.graph alone would leave changed.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    # Not "global": loads of adapters, on a thread of their own, may allocate meanwhile.
    capture = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
    try:
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            work()
    except BaseException:
        # A capture that ends by an error may leave the allocator recording (CUDAGraph::capture_end
        # raises before it says so): nothing could be captured in this memory any more.
        with suppress(RuntimeError):  # it was not recording
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
    return graph
