"""A step by all ranks: rank 0's forward, which the workers follow. Op by op, without graphs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from mora_serve.engine import orders
from mora_serve.engine.forward import Logits
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.step_inputs import StepInputs
from mora_serve.engine.team import Team
from mora_serve.engine.torch_forward import TorchForward


class ParallelForward:
    """Runs batches on this rank's ``forward`` and on all workers at once."""

    reads_whole_pages = True

    def __init__(self, forward: TorchForward, team: Team) -> None:
        self.torch_threads = forward.torch_threads
        self._forward, self._team = forward, team

    def prepare(self) -> None:
        """Nothing to do."""

    def __call__(self, batch: Seq[Chunk], slot: Callable[[str], int]) -> Logits | None:
        """See Forward. Raises DeviceLost when the ranks cannot go on together."""
        inputs = StepInputs.of(batch, slot, self._forward.kv.page_size)
        with self._team.together(orders.Step(inputs)):
            return self._forward.compute(inputs)

    def clear(self, pages: Seq[int]) -> None:
        """Zero pages on every rank."""
        self._team.tell(orders.Clear(tuple(pages)))
        self._forward.kv.clear(pages)
