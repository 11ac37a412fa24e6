"""CUDA graphs of one function of static buffers, by variant; without a card the function itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mora_serve.model.kernels.capture import captured

log = logging.getLogger(__name__)

WARM_UPS = 2  # runs before a capture: kernels are compiled, libraries take their workspaces


@dataclass(frozen=True, slots=True)
class Variant:
    """What a decode step's graph depends on besides its buffers.

    ``rows`` with padding; ``tile_rows``, how mixtures are laid out, 0 where no row has adapters;
    ``scaled``, how many projections have DoRA scales: these get memory as adapters first need them.
    """

    rows: int
    tile_rows: int = 0
    scaled: int = 0


class Graphs:
    """Replays ``work`` by variant. On the CPU it calls it.

    ``work`` launches kernels and looks at no value on the device. What it allocates is shared
    by all graphs, so only static buffers outlive a replay. A graph is captured when it is first
    needed; other threads may use the device meanwhile.
    """

    def __init__(self, work: Callable[[Variant], None], device: torch.device) -> None:
        self._work = work
        self._cuda = device.type == "cuda"
        self._graphs: dict[Variant, Any] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        self._stream: Any = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]

    def run(self, variant: Variant) -> None:
        """Run it for what is in the buffers now."""
        if not self._cuda:
            self._work(variant)
            return
        self.prepare(variant)
        self._graphs[variant].replay()

    def prepare(self, variant: Variant) -> None:
        """Capture the graph if it is not there; on the CPU nothing.

        Runs ``work``, so what is in the buffers must be a step that can be run.
        """
        if not self._cuda or variant in self._graphs:
            return
        started = time.monotonic()
        for other in [v for v in self._graphs if v.tile_rows and v.scaled < variant.scaled]:
            del self._graphs[other]  # it does not read the scales that came since
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                self._work(variant)
        graph = captured(lambda: self._work(variant), self._pool, self._stream)
        main.wait_stream(self._stream)
        self._graphs[variant] = graph
        log.debug("%s captured in %.2f s", variant, time.monotonic() - started)
