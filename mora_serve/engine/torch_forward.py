"""A step by torch: any device, and the reference of the native path."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from mora_serve.engine.forward import Logits
from mora_serve.engine.sampler import is_finite
from mora_serve.engine.scheduler import Chunk
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
        device = self.decoder.device
        tokens: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        last: list[int] = []
        size = self.kv.page_size
        for chunk in batch:
            span = range(chunk.start, chunk.start + chunk.length)
            tokens += chunk.sequence.tokens[chunk.start : span.stop]
            positions += span
            pages = chunk.sequence.pages
            places += [pages[p // size] * size + p % size for p in span]
            if chunk.samples:
                last.append(len(tokens) - 1)
        hidden = self.decoder.hidden(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            self._attention(batch, torch.tensor(places, device=device)),
            self._adapters(batch, slot),
        )
        if not last:
            return None
        logits = self.decoder.logits(hidden[torch.tensor(last, device=device)])
        return Logits.of(logits, logits.argmax(-1).tolist(), is_finite(logits).tolist())

    def _attention(self, batch: Seq[Chunk], slots: torch.Tensor) -> PagedAttention:
        device, size = self.decoder.device, self.kv.page_size
        window = self.decoder.shape.sliding_window
        group = self.decoder.shape.heads // self.decoder.shape.kv_heads
        decodes = [c for c in batch if c.length == 1]
        width = max((-(-(c.start + 1) // size) for c in decodes), default=0)
        table = [_padded(c.sequence.pages, width) for c in decodes]
        prefills, row = [], len(decodes)
        for chunk in batch[len(decodes) :]:
            used = -(-(chunk.start + chunk.length) // size)
            prefills.append(
                Prefill(
                    slice(row, row + chunk.length),
                    chunk.start,
                    torch.tensor(chunk.sequence.pages[:used], device=device),
                    prefill_mask(chunk.start, chunk.length, group, window, device),
                )
            )
            row += chunk.length
        return PagedAttention(
            self.kv,
            slots,
            torch.tensor(table, dtype=torch.long, device=device).view(len(decodes), width),
            torch.tensor([c.start + 1 for c in decodes], dtype=torch.long, device=device),
            prefills,
            window,
        )

    def _adapters(self, batch: Seq[Chunk], slot: Callable[[str], int]) -> PooledAdapters | None:
        mixtures = [
            tuple((slot(digest), weight) for digest, weight in chunk.sequence.weights)
            for chunk in batch
        ]
        plan = plan_mixtures(self.slots, mixtures, [chunk.length for chunk in batch])
        return None if plan is None else PooledAdapters(self.slots, plan)


def _padded(pages: Seq[int], width: int) -> list[int]:
    return list(pages[:width]) + [0] * (width - len(pages))
