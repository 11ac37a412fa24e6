"""CUDA graphs of one function of static buffers, by variant; without a card the function itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from mora_serve.model.kernels.capture import captured
from mora_serve.model.shard import Group

log = logging.getLogger(__name__)

WARM_UPS = 2  # runs before a capture: kernels are compiled, libraries take their workspaces

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Variant:
    """What a decode step's graph depends on besides its buffers.

    ``rows`` with padding; ``tile_rows``, how mixtures are laid out, 0 where no row has adapters.
    """

    rows: int
    tile_rows: int = 0


class Capture(Protocol):
    """Makes one launch of what some work launches."""

    def beside(self) -> AbstractContextManager[object]:
        """Where the work is warmed up: after what was launched before, and before what follows."""
        ...

    def __call__(self, work: Work) -> Work:
        """The replay of work that was warmed up. What it raises is about the capture alone."""
        ...


class CardCapture:
    """On a stream of its own; what graphs allocate is in memory that all of them share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin()

    def _begin(self) -> None:
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """See Capture."""
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            main.wait_stream(self._stream)

    def __call__(self, work: Work) -> Work:
        """See Capture; other threads may use the device meanwhile."""
        try:
            replay: Work = captured(work, self._pool, self._stream).replay
        except BaseException:
            self._begin()  # nothing is captured any more where a capture may count as under way
            raise
        return replay


class Graphs:
    """Replays ``work`` by variant. On the CPU it calls it.

    ``work`` launches kernels and looks at no value on the device. What it allocates is shared
    by all graphs, so only static buffers outlive a replay. A graph is captured when it is first
    needed. A variant that cannot be captured runs as it is from then on: slower, but right.

    Where ``work`` has sums of a ``group``, all ranks prepare the same variants in the same order. A
    variant that one of them cannot capture none replays: NCCL wants an operation captured by every
    rank or by none (its guide, "Using NCCL with CUDA Graphs").
    """

    def __init__(
        self,
        work: Callable[[Variant], None],
        device: torch.device,
        capture: Capture | None = None,
        group: Group | None = None,
    ) -> None:
        """``capture``: on a card CardCapture if None, elsewhere there are no graphs without it."""
        self._work = work
        if capture is None and device.type == "cuda":
            capture = CardCapture(device)
        self._capture, self._group = capture, group
        self._replays: dict[Variant, Work] = {}
        self.eager: set[Variant] = set()  # those that could not be captured

    def run(self, variant: Variant) -> None:
        """Run it for what is in the buffers now."""
        if self._capture is None:
            self._work(variant)
            return
        self.prepare(variant)
        self._replays[variant]()

    def prepare(self, variant: Variant) -> None:
        """Capture the graph if it is not there; on the CPU nothing.

        Runs ``work``, so what is in the buffers must be a step that can be run. Raises what that
        raises.
        """
        if self._capture is None or variant in self._replays:
            return
        started = time.monotonic()
        work = partial(self._work, variant)
        with self._capture.beside():
            for _ in range(WARM_UPS):
                work()
        replay: Work = work
        why = ""
        try:
            replay = self._capture(work)
        except Exception as error:
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self._group is not None and not self._group.all_can(not why):
            replay, why = work, why or "another rank cannot"
        self._replays[variant] = replay
        if why:
            self.eager.add(variant)
            log.warning(
                "%s cannot be captured and runs kernel by kernel, which is slower: %s",
                *(variant, why),
            )
        else:
            log.debug("%s captured in %.2f s", variant, time.monotonic() - started)
