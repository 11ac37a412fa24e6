"""One forward for the whole batch: chunks of sequences in, one sampled token a chunk out."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from mora_serve.config import EngineConfig
from mora_serve.core import TokenOut
from mora_serve.engine.adapter_pool import AdapterPool
from mora_serve.engine.sampler import SamplingRow, is_finite, sample
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence
from mora_serve.model.attention import KVPages, PagedAttention, Prefill, prefill_mask
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import PooledAdapters, plan_mixtures


def kv_page_count(decoder: Decoder, config: EngineConfig, max_context: int) -> int:
    """Pages of the cache: as configured, or what kv_bytes holds, but no more than ever needed.

    One page more than usable: page 0 stays zero and pads page tables.
    """
    if config.kv_pages:
        return config.kv_pages + 1
    shape = decoder.shape
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * decoder.dtype.itemsize
    fits = config.kv_bytes // (token_bytes * config.page_size)
    needed = config.max_batch * -(-max_context // config.page_size)
    return max(1, min(fits, needed)) + 1


class Runner:
    """Owns the key/value pages and runs batches on the decoder."""

    def __init__(self, decoder: Decoder, pool: AdapterPool, pages: int, page_size: int) -> None:
        shape = decoder.shape
        self.decoder, self.pool = decoder, pool
        self.kv = KVPages(
            *(shape.layers, shape.kv_heads, shape.head_dim, pages, page_size),
            decoder.dtype,
            decoder.device,
        )

    def clear(self, pages: Seq[int]) -> None:
        """Zero pages that have a new owner (see KVCache.take_new)."""
        if pages:
            self.kv.clear(pages)

    @torch.inference_mode()
    def run(self, batch: Seq[Chunk]) -> list[tuple[Sequence, TokenOut | None]]:
        """Compute the chunks; for each that reaches its sequence's end, sample the next token.

        A None in place of the token says that the row's logits were not finite.
        """
        device = self.decoder.device
        batch = sorted(batch, key=lambda c: c.length > 1)  # single tokens share one product
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last: list[int] = []
        size = self.kv.page_size
        for chunk in batch:
            span = range(chunk.start, chunk.start + chunk.length)
            tokens += chunk.sequence.tokens[chunk.start : span.stop]
            positions += span
            pages = chunk.sequence.pages
            slots += [pages[p // size] * size + p % size for p in span]
            if chunk.samples:
                last.append(len(tokens) - 1)
        hidden = self.decoder.hidden(
            torch.tensor(tokens, device=device),
            torch.tensor(positions, device=device),
            self._attention(batch, torch.tensor(slots, device=device)),
            self._adapters(batch),
        )
        sampling = [chunk.sequence for chunk in batch if chunk.samples]
        if not sampling:
            return []
        logits = self.decoder.logits(hidden[torch.tensor(last, device=device)])
        finite = is_finite(logits).tolist()
        rows = [SamplingRow(s.request.sampling, s.request.prompt, s.output) for s in sampling]
        good = [i for i, ok in enumerate(finite) if ok]
        if len(good) < len(rows):
            logits, rows = logits[good], [rows[i] for i in good]
        sampled = iter(sample(logits, rows) if rows else ())
        return [
            (sequence, next(sampled) if ok else None)
            for sequence, ok in zip(sampling, finite, strict=True)
        ]

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

    def _adapters(self, batch: Seq[Chunk]) -> PooledAdapters | None:
        mixtures = [
            tuple((self.pool.slot(digest), weight) for digest, weight in chunk.sequence.weights)
            for chunk in batch
        ]
        plan = plan_mixtures(self.pool.slots, mixtures, [chunk.length for chunk in batch])
        return None if plan is None else PooledAdapters(self.pool.slots, plan)


def _padded(pages: Seq[int], width: int) -> list[int]:
    return list(pages[:width]) + [0] * (width - len(pages))
