"""The part of a step that runs on the device, by Triton's kernels: from buffers to tokens.

What a step reads lies in buffers that do not move (see step_buffers.py). Of single tokens it is a
CUDA graph, replayed in one launch whatever the mixtures; with prompts it runs kernel by kernel on
buffers of its own. What a graph holds is ``_decode``, a plain function of the buffers. Without a
card there are no graphs and it is called as it is: so Triton's interpreter runs all of this but
the capture.

Rank 0 lays steps out (see cuda_forward.py). Where ranks share the base, the others are sent what it
laid out, as bytes, and run the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mora_serve.engine.graphs import Capture, Graphs, Variant
from mora_serve.engine.step_buffers import StepBuffers
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


@dataclass(frozen=True, slots=True)
class Room:
    """The most of a step: tokens of a sequence, chunks of a step, adapters of a mixture."""

    max_context: int
    max_batch: int
    max_mixture: int


@dataclass(frozen=True, slots=True)
class PromptStep:
    """A step with prompts: ``tokens`` in ``chunks``, the first ``single`` chunks of one token.

    No chunk is above ``longest``; ``sampled`` of them sample. ``tile_rows`` as in Variant.
    """

    tokens: int
    chunks: int
    single: int
    longest: int
    sampled: int
    tile_rows: int = 0


Step = Variant | PromptStep  # a Variant is a step of single tokens


@dataclass(frozen=True, slots=True)
class LaidOut:
    """A step and what is in its buffers and in those of its mixtures: it can be sent.

    ``room`` is for how many tokens buffers of prompts were laid out, by which fields have places.
    Of the page table only the ``pages`` that are read are sent: whole contexts are megabytes.
    """

    step: Step
    room: int
    pages: int
    buffers: bytes
    mixtures: bytes


class KernelStep:
    """Runs steps that are laid out in ``decodes`` or ``prompts`` and their mixtures.

    The logits and tokens of the rows that sample are in the first rows of ``logits`` [max_batch,
    vocabulary] and ``tokens`` [max_batch] until the next step.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: Slots,
        kv: KVPages,
        room: Room,
        product: Products | None = None,
        capture: Capture | None = None,
    ) -> None:
        """``product`` multiplies by the base's matrices; measured here if None.

        ``capture`` makes the graphs, see Graphs.
        """
        shape, device, most = decoder.shape, decoder.device, room.max_batch
        self.decoder, self.slots, self.kv, self.room, self.device = decoder, slots, kv, room, device
        self.buckets = buckets(most)
        self._pages = -(-room.max_context // kv.page_size)
        with self.on_device():
            self.early_launches = overlap_pays(slots, card_seconds)
            self.product = product or measured(decoder)
        self.decodes = StepBuffers(most, most, self._pages, device)
        self.adapters = self._make_adapters(most)
        self.prompts = StepBuffers(0, most, self._pages, device)
        self.prompt_adapters = self._make_adapters(1)
        self.graphs = Graphs(self._decode, device, capture, decoder.group)
        self._scratch = DecodeScratch.of(
            most, shape.heads, shape.head_dim, room.max_context, device
        )
        self.logits = torch.zeros(most, shape.vocab_size, dtype=decoder.dtype, device=device)
        self._pick = Pick(most, shape.vocab_size, device)
        self.tokens = self._pick.tokens
        self._kernels = KernelDecoder(decoder, kv, self.product)

    def on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture all graphs that steps need, the largest first: they share memory.

        Every row of ``decodes`` is padding afterwards. On a card the kernels of steps with prompts
        are compiled as well.
        """
        with self.on_device():
            self.decodes.pad()  # captures run it: padding writes nowhere
            for rows in reversed(self.buckets):
                self.graphs.prepare(Variant(rows))
                for tile_rows in tile_sizes(rows, self.room.max_mixture):
                    self.adapters.fill([()] * rows, [1] * rows, tile_rows)
                    self.graphs.prepare(Variant(rows, tile_rows))
            if self.device.type == "cuda":
                self.compile_prompts()

    @torch.inference_mode()
    def compile_prompts(self, lengths: Sequence[int] = (8, 512)) -> None:
        """Run prompts of padding: nothing is kept of them."""
        most = self._pages * self.kv.page_size
        for length in (min(n, most) for n in lengths):
            buffers = self.make_room(length)
            host = buffers.begin()
            host["places"][:], host["counts"][0], host["contexts"][0] = -1, length, 0
            host["tokens"][:], host["positions"][:], host["table"][0] = 0, 0, 0
            host["starts"][0] = 0
            buffers.upload(1)
            for tile_rows in (0, *tile_sizes(length, self.room.max_mixture)):
                if tile_rows:
                    self.prompt_adapters.fill([()], [length], tile_rows)
                self._prompt(PromptStep(length, 1, 0, length, 0, tile_rows))

    def run(self, step: Step) -> None:
        """Launch a step that is laid out."""
        if isinstance(step, PromptStep):
            self._prompt(step)
            return
        self.graphs.run(step)
        if self.decoder.group is not None:
            self.decoder.group.launched()

    def laid_out(self, step: Step) -> LaidOut:
        """What another rank needs to run a step that was laid out here last."""
        buffers, adapters = self.decodes, self.adapters
        if isinstance(step, PromptStep):
            buffers, adapters = self.prompts, self.prompt_adapters
        chunks = _chunks(step)
        pages = -(-int(buffers.begin()["lengths"][:chunks].max()) // self.kv.page_size)
        mixtures = adapters.buffers.image() if step.tile_rows else b""
        return LaidOut(step, buffers.tokens, pages, buffers.image(chunks, pages), mixtures)

    def follow(self, inputs: LaidOut) -> None:
        """Run a step as rank 0 has laid it out."""
        step = inputs.step
        with self.on_device():
            buffers, adapters = self.decodes, self.adapters
            if isinstance(step, PromptStep):
                if inputs.room != self.prompts.tokens:
                    self._set_room(inputs.room)
                buffers, adapters = self.prompts, self.prompt_adapters
            buffers.receive(inputs.buffers, _chunks(step), inputs.pages)
            if step.tile_rows:
                adapters.buffers.receive(inputs.mixtures, step.tile_rows)
            self.run(step)

    def make_room(self, tokens: int) -> StepBuffers:
        """``prompts``, with room for so many tokens."""
        if tokens > self.prompts.tokens:
            self._set_room(1 << (tokens - 1).bit_length())
        return self.prompts

    def _set_room(self, tokens: int) -> None:
        prompts = StepBuffers(tokens, self.room.max_batch, self._pages, self.device)
        adapters = self._make_adapters(tokens)  # there may be no memory: then both stay as they are
        self.prompts, self.prompt_adapters = prompts, adapters

    def _decode(self, variant: Variant) -> None:
        """What a graph holds: from the buffers to the tokens of their first rows."""
        n, d = variant.rows, self.decodes.device
        table, lengths = d["table"][:n], d["lengths"][:n]

        def attend(keys: Tensor, values: Tensor, q: Tensor) -> Tensor:
            out = torch.empty_like(q)
            window = self.decoder.shape.sliding_window
            decode_attention(q, keys, values, table, lengths, window, out, self._scratch)
            return out.flatten(1)

        adapters = self.adapters if variant.tile_rows else None
        hidden = self._kernels.hidden(*self.decodes.rows(n), attend, adapters)
        self._sample(self.decodes, hidden)

    def _prompt(self, step: PromptStep) -> None:
        hidden = self._kernels.hidden(
            *self.prompts.rows(step.tokens),
            self._attend_prompts(step),
            self.prompt_adapters if step.tile_rows else None,
        )
        if step.sampled:
            self._sample(self.prompts, hidden[self.prompts.device["last"][: step.sampled]])

    def _attend_prompts(self, step: PromptStep) -> Attend:
        d = self.prompts.device
        window = self.decoder.shape.sliding_window
        decodes, prompts = slice(0, step.single), slice(step.single, step.chunks)

        def attend(keys: Tensor, values: Tensor, q: Tensor) -> Tensor:
            out = torch.empty_like(q)
            if step.single:
                lengths, table = d["lengths"][decodes], d["table"][decodes]
                of = q[decodes], keys, values, table, lengths, window, out[decodes]
                decode_attention(*of, self._scratch)
            table, starts = d["table"][prompts], d["starts"][prompts]
            sizes = d["contexts"][prompts], d["counts"][prompts]
            prefill_attention(q, keys, values, table, starts, *sizes, step.longest, window, out)
            return out.flatten(1)

        return attend

    def _sample(self, buffers: StepBuffers, hidden: Tensor) -> None:
        """Logits and tokens of rows of hidden states, which the sampling fields describe."""
        n, d, head = len(hidden), buffers.device, self.decoder.head
        logits, group = self.logits[:n], self.decoder.group
        if group is None and isinstance(head, DenseWeight):
            torch.mm(hidden, head.weight.T, out=logits)
        else:
            part = self.product.part(head, hidden)
            if group is not None:
                part = group.join(part, self.decoder.shape.vocab_size)
            logits.copy_(part)
        self._pick(logits, *(d[name][:n] for name in ("temperatures", "seeds", "draws")))

    def _make_adapters(self, rows: int) -> KernelAdapters:
        slots = self.slots
        buffers = MixtureBuffers(rows, self.room.max_mixture, len(slots.ranks), slots.device)
        return KernelAdapters(slots, buffers, self.early_launches)


def _chunks(step: Step) -> int:
    return step.chunks if isinstance(step, PromptStep) else step.rows


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
