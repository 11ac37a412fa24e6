"""A step by torch: any device, and the reference of the native path."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from mora_serve.engine.forward import Logits
from mora_serve.engine.sampler import is_finite
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.step_inputs import IntArray, StepInputs
from mora_serve.model.attention import KVPages, PagedAttention, Prefill, prefill_mask
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import AdapterSlots, PooledAdapters, plan_mixtures


class TorchForward:
    """Runs batches through the decoder, op by op."""

    reads_whole_pages = True

    def __init__(
        self, decoder: Decoder, slots: AdapterSlots, kv: KVPages, threads: int = 0
    ) -> None:
        self.decoder, self.slots, self.kv = decoder, slots, kv
        self.torch_threads = threads

    def prepare(self) -> None:
        """Nothing to do."""

    def __call__(self, batch: Seq[Chunk], slot: Callable[[str], int]) -> Logits | None:
        """See Forward; single tokens come first in the batch, as they share one product."""
        return self.compute(StepInputs.of(batch, slot, self.kv.page_size))

    def compute(self, inputs: StepInputs) -> Logits | None:
        """A step by its plain inputs."""
        logits = self.logits(inputs)
        if logits is None:
            return None
        return Logits.of(logits, logits.argmax(-1).tolist(), is_finite(logits).tolist())

    def follow(self, inputs: StepInputs) -> None:
        """See Follower."""
        self.logits(inputs)

    def logits(self, inputs: StepInputs) -> Tensor | None:
        """The logits [n, vocabulary] of the chunks that sample; None where none does."""
        hidden = self.decoder.hidden(
            self._tensor(inputs.tokens),
            self._tensor(inputs.positions),
            self._attention(inputs),
            self._adapters(inputs),
        )
        if not len(inputs.last):
            return None
        return self.decoder.logits(hidden[self._tensor(inputs.last)])

    def _tensor(self, array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(self.decoder.device)

    def _attention(self, inputs: StepInputs) -> PagedAttention:
        device, shape = self.decoder.device, self.decoder.shape
        window, group = shape.sliding_window, shape.heads // shape.kv_heads
        prefills, row = [], len(inputs.contexts)
        for chunk in inputs.prefills:
            prefills.append(
                Prefill(
                    slice(row, row + chunk.length),
                    chunk.start,
                    self._tensor(chunk.pages),
                    prefill_mask(chunk.start, chunk.length, group, window, device),
                )
            )
            row += chunk.length
        return PagedAttention(
            self.kv,
            self._tensor(inputs.places),
            self._tensor(inputs.table),
            self._tensor(inputs.contexts),
            prefills,
            window,
        )

    def _adapters(self, inputs: StepInputs) -> PooledAdapters | None:
        plan = plan_mixtures(self.slots, inputs.mixtures, inputs.lengths)
        return None if plan is None else PooledAdapters(self.slots, plan)
