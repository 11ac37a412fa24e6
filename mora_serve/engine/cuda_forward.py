"""A step by Triton's kernels: on a card decode steps are CUDA graphs, whatever their mixtures.

A step in which every chunk is one token runs in a bucket: the next larger number of rows for which
there is a graph, the rows left over being padding. What such a step reads lies in buffers that do
not move (see step_buffers.py), so that a replay is one launch after one copy, and its tokens come
back in one small copy. While it runs, the next one of the same sequences is laid out. Steps with
prompts run kernel by kernel on buffers of their own.

What a graph holds is ``_decode``, a plain function of those buffers. Without a card there are no
graphs and it is called as it is: so Triton's interpreter runs all of this but the capture.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mora_serve.engine.forward import Logits
from mora_serve.engine.graphs import Capture, Graphs, Variant
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.step_buffers import DecodeRows, Ints, StepBuffers, fill_prompts
from mora_serve.model.attention import KVPages
from mora_serve.model.decoder import Decoder
from mora_serve.model.kernels.decoder import Attend, KernelDecoder
from mora_serve.model.kernels.mixed_lora import KernelAdapters, Slots
from mora_serve.model.kernels.mixtures import MixtureBuffers, best_tile_rows
from mora_serve.model.kernels.overlap import overlap_pays
from mora_serve.model.kernels.paged_attention import (
    DecodeScratch,
    decode_attention,
    prefill_attention,
)
from mora_serve.model.kernels.products import (
    BY_DENSE,
    TORCH,
    Products,
    card_seconds,
    known_ways,
    measure,
)
from mora_serve.model.kernels.sampling import Pick
from mora_serve.model.quant import DenseWeight, Linear

SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


def buckets(max_batch: int) -> list[int]:
    """Numbers of rows for which there are graphs: few rows of padding, few graphs."""
    more = range(96, max_batch + 32, 32)
    return sorted({min(b, max_batch) for b in (*SMALL_BUCKETS, *more)})


class CudaForward:
    """Runs batches by kernels; see Forward.

    ``max_batch`` is the most chunks of a step and ``max_mixture`` the most adapters of one.
    """

    reads_whole_pages = False
    torch_threads = 0

    def __init__(
        self,
        decoder: Decoder,
        slots: Slots,
        kv: KVPages,
        max_context: int,
        max_batch: int,
        max_mixture: int,
        product: Products | None = None,
        capture: Capture | None = None,
    ) -> None:
        """``product`` multiplies by the base's matrices; measured here if None.

        ``capture`` makes the graphs, see Graphs.
        """
        shape, device = decoder.shape, decoder.device
        self._decoder, self._slots, self._kv = decoder, slots, kv
        self._device = device
        self._pages = -(-max_context // kv.page_size)
        self._max_batch, self._max_mixture = max_batch, max_mixture
        self._buckets = buckets(max_batch)
        self._steps = StepBuffers(max_batch, max_batch, self._pages, device)
        self._rows = DecodeRows(self._steps, kv.page_size)
        with self._on_device():
            self.early_launches = overlap_pays(slots, card_seconds)
        self._adapters = self._make_adapters(max_batch)
        self._variant = Variant(0)  # but for its rows: of the mixtures that were laid out last
        self._stale = True  # they are not those of the rows
        self._graphs = Graphs(self._decode, device, capture)
        self._prompts = StepBuffers(0, max_batch, self._pages, device)
        self._prompt_adapters = self._make_adapters(1)
        self._scratch = DecodeScratch.of(
            max_batch, shape.heads, shape.head_dim, max_context, device
        )
        self._logits = torch.zeros(max_batch, shape.vocab_size, dtype=decoder.dtype, device=device)
        self._pick = Pick(max_batch, shape.vocab_size, device)
        self._picked = torch.zeros(max_batch, dtype=torch.int32, pin_memory=device.type == "cuda")
        with self._on_device():
            self.product = product or measured(decoder)
        self._kernels = KernelDecoder(decoder, kv, self.product)

    @property
    def eager(self) -> set[Variant]:
        """Steps that could not be captured and run kernel by kernel."""
        return self._graphs.eager

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture all graphs that steps need, the largest first: they share memory.

        On a card the kernels of steps with prompts are compiled as well.
        """
        with self._on_device():
            self._rows.reset()
            self._steps.upload(0)  # captures run it: padding writes nowhere
            self._stale = True
            for rows in reversed(self._buckets):
                self._graphs.prepare(Variant(rows))
                for tile_rows in tile_sizes(rows, self._max_mixture):
                    self._adapters.fill([()] * rows, [1] * rows, tile_rows)
                    self._graphs.prepare(Variant(rows, tile_rows))
            if self._device.type == "cuda":
                self.compile_prompts()

    @torch.inference_mode()
    def compile_prompts(self, lengths: Seq[int] = (8, 512)) -> None:
        """Run prompts of padding: nothing is kept of them."""
        most = self._pages * self._kv.page_size
        for length in (min(n, most) for n in lengths):
            buffers = self._prompt_buffers(length)
            host = buffers.begin()
            host["places"][:], host["counts"][0], host["contexts"][0] = -1, length, 0
            host["tokens"][:], host["positions"][:], host["table"][0] = 0, 0, 0
            host["starts"][0] = 0
            buffers.upload(1)
            attend = self._attend_prompts(0, 1, length)
            rows = buffers.rows(length)
            self._kernels.hidden(*rows, attend)
            for tile_rows in tile_sizes(length, self._max_mixture):
                self._prompt_adapters.fill([()], [length], tile_rows)
                self._kernels.hidden(*rows, attend, self._prompt_adapters)

    def __call__(self, batch: Seq[Chunk], slot: Callable[[str], int]) -> Logits | None:
        """See Forward; single tokens come first in the batch."""
        with self._on_device():
            decodes = all(chunk.length == 1 for chunk in batch)
            run = self._run_decodes if decodes else self._run_prompts
            buffers, rows = run(batch, slot)
            self._fetch(rows)
            if decodes:
                self._rows.ahead()  # while the device computes this one
            return self._read(buffers, rows)

    def _run_decodes(
        self, batch: Seq[Chunk], slot: Callable[[str], int]
    ) -> tuple[StepBuffers, Ints]:
        """A step of single tokens; where the rows that sample are."""
        bucket = self._buckets[bisect_left(self._buckets, len(batch))]
        rows, changed = self._rows.fill(batch, bucket, slot)
        self._stale |= changed
        if self._stale:
            mixtures = self._rows.mixtures[:bucket]
            self._variant = Variant(bucket)
            if any(mixtures):
                tile_rows = self._adapters.fill(mixtures, [1] * bucket)
                self._variant = Variant(bucket, tile_rows)
            self._stale = False
        self._graphs.run(replace(self._variant, rows=bucket))
        samples = np.fromiter((chunk.samples for chunk in batch), bool, len(batch))
        return self._steps, rows[samples]

    def _decode(self, variant: Variant) -> None:
        """What a graph holds: from the buffers to the tokens of their first rows."""
        n, d = variant.rows, self._steps.device
        table, lengths = d["table"][:n], d["lengths"][:n]

        def attend(keys: Tensor, values: Tensor, q: Tensor) -> Tensor:
            out = torch.empty_like(q)
            window = self._decoder.shape.sliding_window
            decode_attention(q, keys, values, table, lengths, window, out, self._scratch)
            return out.flatten(1)

        hidden = self._kernels.hidden(
            *self._steps.rows(n),
            attend,
            self._adapters if variant.tile_rows else None,
        )
        self._sample(self._steps, hidden)

    def _run_prompts(
        self, batch: Seq[Chunk], slot: Callable[[str], int]
    ) -> tuple[StepBuffers, Ints]:
        """A step with prompts; where the rows that sample are."""
        total = sum(chunk.length for chunk in batch)
        buffers = self._prompt_buffers(total)
        d = buffers.device
        sampled = fill_prompts(buffers, batch, self._kv.page_size)
        single = sum(chunk.length == 1 for chunk in batch)
        longest = max(chunk.length for chunk in batch)
        mixtures = [tuple((slot(x), w) for x, w in c.sequence.weights) for c in batch]
        if any(mixtures):
            self._prompt_adapters.fill(mixtures, [chunk.length for chunk in batch])
        hidden = self._kernels.hidden(
            *buffers.rows(total),
            self._attend_prompts(single, len(batch), longest),
            self._prompt_adapters if any(mixtures) else None,
        )
        if sampled:
            self._sample(buffers, hidden[d["last"][:sampled]])
        return buffers, np.arange(sampled)

    def _prompt_buffers(self, tokens: int) -> StepBuffers:
        """Those of steps with prompts, with room for so many tokens."""
        if tokens > self._prompts.tokens:
            room = 1 << (tokens - 1).bit_length()
            self._prompts = StepBuffers(room, self._max_batch, self._pages, self._device)
            self._prompt_adapters = self._make_adapters(room)
        return self._prompts

    def _attend_prompts(self, single: int, chunks: int, longest: int) -> Attend:
        """Of ``chunks`` chunks, the first ``single`` of one token, none above ``longest``."""
        d = self._prompts.device
        window = self._decoder.shape.sliding_window
        decodes, prompts = slice(0, single), slice(single, chunks)

        def attend(keys: Tensor, values: Tensor, q: Tensor) -> Tensor:
            out = torch.empty_like(q)
            if single:
                lengths, table = d["lengths"][decodes], d["table"][decodes]
                of = q[decodes], keys, values, table, lengths, window, out[decodes]
                decode_attention(*of, self._scratch)
            table, starts = d["table"][prompts], d["starts"][prompts]
            sizes = d["contexts"][prompts], d["counts"][prompts]
            prefill_attention(q, keys, values, table, starts, *sizes, longest, window, out)
            return out.flatten(1)

        return attend

    def _sample(self, buffers: StepBuffers, hidden: Tensor) -> None:
        """Logits and tokens of rows of hidden states, which the sampling fields describe."""
        n, d, head = len(hidden), buffers.device, self._decoder.head
        logits = self._logits[:n]
        if isinstance(head, DenseWeight):
            torch.mm(hidden, head.weight.T, out=logits)
        else:
            logits.copy_(self.product.part(head, hidden))
        self._pick(logits, *(d[name][:n] for name in ("temperatures", "seeds", "draws")))

    def _fetch(self, rows: Ints) -> None:
        """Start to bring the step's tokens here, in one small copy."""
        used = int(rows.max()) + 1 if len(rows) else 0
        self._picked[:used].copy_(self._pick.tokens[:used], non_blocking=True)

    def _read(self, buffers: StepBuffers, rows: Ints) -> Logits | None:
        """Wait for the step, and take its tokens."""
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if not len(rows):
            return None
        tokens = self._picked.numpy()[rows]

        def read(wanted: Seq[int]) -> Tensor:
            where = torch.from_numpy(rows[list(wanted)]).to(self._device)
            return self._logits[where].float()

        return Logits(read, tokens.clip(0).tolist(), (tokens >= 0).tolist(), buffers.drawn(rows))

    def _make_adapters(self, rows: int) -> KernelAdapters:
        slots = self._slots
        buffers = MixtureBuffers(rows, self._max_mixture, len(slots.ranks), slots.device)
        return KernelAdapters(slots, buffers, self.early_launches)

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def measured(decoder: Decoder) -> Products:
    """The ways to multiply by this decoder's 4-bit matrices, on a card by measurement."""
    ways = known_ways(decoder.device, decoder.dtype)
    if decoder.device.type != "cuda":
        return Products(ways, TORCH)
    linears = [site for layer in decoder.layers for site in layer.sites.values()]
    linears.append(Linear((decoder.head,)))
    return Products(ways, BY_DENSE, measure(linears, decoder.dtype, ways, card_seconds))


def tile_sizes(rows: int, max_mixture: int) -> list[int]:
    """The sizes of tiles that mixtures of so many single tokens can be laid out in."""
    entries = range(1, rows * max_mixture + 1)
    return sorted({best_tile_rows(n, m) for n in entries for m in (1, n)})
