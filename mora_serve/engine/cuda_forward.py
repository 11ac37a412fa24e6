"""A step by Triton's kernels: it is laid out here, and runs in kernel_step.py.

A step in which every chunk is one token runs in a bucket: the next larger number of rows for which
there is a graph, the rows left over being padding. Its tokens come back in one small copy, and
while it runs, the next one of the same sequences is laid out. Where ranks share the base, all run
what rank 0 lays out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from mora_serve.engine import orders
from mora_serve.engine.forward import Logits
from mora_serve.engine.graphs import Variant
from mora_serve.engine.kernel_step import KernelStep, PromptStep, Step
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.step_buffers import DecodeRows, Ints, StepBuffers, fill_prompts
from mora_serve.engine.team import Team


class CudaForward:
    """Runs batches by kernels; see Forward.

    ``step`` computes them here; the workers of a ``team`` follow with theirs.
    """

    reads_whole_pages = False
    torch_threads = 0

    def __init__(self, step: KernelStep, team: Team | None = None) -> None:
        self.step, self._team = step, team
        self._rows = DecodeRows(step.decodes, step.kv.page_size)
        self._tile_rows = 0  # of the mixtures that were laid out last
        self._stale = True  # they are not those of the rows
        pinned = step.device.type == "cuda"
        self._picked = torch.zeros(step.room.max_batch, dtype=torch.int32, pin_memory=pinned)

    @property
    def eager(self) -> set[Variant]:
        """Steps that could not be captured and run kernel by kernel."""
        return self.step.graphs.eager

    def prepare(self) -> None:
        """Capture the graphs and compile what steps need; see KernelStep."""
        self._rows.reset()
        self._stale = True
        with self._together(orders.Prepare()):
            self.step.prepare()

    def __call__(self, batch: Seq[Chunk], slot: Callable[[str], int]) -> Logits | None:
        """See Forward; single tokens come first in the batch. Raises DeviceLost as a team does."""
        with self.step.on_device():
            decodes = all(chunk.length == 1 for chunk in batch)
            lay_out = self._lay_out_decodes if decodes else self._lay_out_prompts
            step, rows = lay_out(batch, slot)
            order = orders.Step(self.step.laid_out(step)) if self._team else None
            with self._together(order):
                self.step.run(step)
                self._fetch(rows)
                if decodes:
                    self._rows.ahead()  # while the device computes this one
                return self._read(self.step.decodes if decodes else self.step.prompts, rows)

    def _lay_out_decodes(self, batch: Seq[Chunk], slot: Callable[[str], int]) -> tuple[Step, Ints]:
        """A step of single tokens; where the rows that sample are."""
        buckets = self.step.buckets
        bucket = buckets[bisect_left(buckets, len(batch))]
        rows, changed = self._rows.fill(batch, bucket, slot)
        self._stale |= changed
        if self._stale:
            mixtures = self._rows.mixtures[:bucket]
            self._tile_rows = 0
            if any(mixtures):
                self._tile_rows = self.step.adapters.fill(mixtures, [1] * bucket)
            self._stale = False
        samples = np.fromiter((chunk.samples for chunk in batch), bool, len(batch))
        return Variant(bucket, self._tile_rows), rows[samples]

    def _lay_out_prompts(self, batch: Seq[Chunk], slot: Callable[[str], int]) -> tuple[Step, Ints]:
        """A step with prompts; where the rows that sample are."""
        lengths = [chunk.length for chunk in batch]
        buffers = self.step.make_room(sum(lengths))
        sampled = fill_prompts(buffers, batch, self.step.kv.page_size)
        mixtures = [tuple((slot(x), w) for x, w in c.sequence.weights) for c in batch]
        step = PromptStep(
            tokens=sum(lengths),
            chunks=len(batch),
            single=lengths.count(1),
            longest=max(lengths),
            sampled=sampled,
            tile_rows=self.step.prompt_adapters.fill(mixtures, lengths) if any(mixtures) else 0,
        )
        return step, np.arange(sampled)

    def _fetch(self, rows: Ints) -> None:
        """Start to bring the step's tokens here, in one small copy."""
        used = int(rows.max()) + 1 if len(rows) else 0
        self._picked[:used].copy_(self.step.tokens[:used], non_blocking=True)

    def _read(self, buffers: StepBuffers, rows: Ints) -> Logits | None:
        """Wait for the step, and take its tokens."""
        if self.step.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if not len(rows):
            return None
        tokens = self._picked.numpy()[rows]

        def read(wanted: Seq[int]) -> Tensor:
            where = torch.from_numpy(rows[list(wanted)]).to(self.step.device)
            return self.step.logits[where].float()

        return Logits(read, tokens.clip(0).tolist(), (tokens >= 0).tolist(), buffers.drawn(rows))

    def _together(self, order: object) -> AbstractContextManager[object]:
        return self._team.together(order) if self._team else nullcontext()
