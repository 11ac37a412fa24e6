"""A step on the CPU in one call of the native path: decoder, adapters, attention and head."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mora_serve.engine.forward import Logits
from mora_serve.engine.scheduler import Chunk
from mora_serve.model.attention import KVPages
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import AdapterSlots
from mora_serve.model.memory import Arena
from mora_serve.model.native.library import (
    LayerStruct,
    LinearStruct,
    ModelStruct,
    Native,
    ProjectionStruct,
    StepStruct,
    targets,
)
from mora_serve.model.native.weight import NativeLinear, can_tile_layer, tiled, weight_struct
from mora_serve.model.quant import Linear
from mora_serve.model.shape import SITES


def can_run(decoder: Decoder) -> bool:
    """Whether the native path is built, has this decoder's type, and takes all its weights."""
    sites = [s for layer in decoder.layers for s in layer.sites.values()]
    return (
        decoder.device.type == "cpu"
        and bool(targets(decoder.dtype))
        and all(map(can_tile_layer, [*sites, Linear((decoder.head,))]))
    )


class NativeForward:
    """Runs batches. The decoder's weights are put in the native layout, in place."""

    reads_whole_pages = False
    torch_threads = 1  # a second team that waits for work would take the cores of this one

    def __init__(
        self,
        decoder: Decoder,
        slots: AdapterSlots,
        kv: KVPages,
        max_context: int,
        threads: int,
        target: str = "",
    ) -> None:
        """``target`` is one of ``targets(dtype)``; the best if empty."""
        self._decoder, self._slots, self._kv = decoder, slots, kv
        self.native = Native(decoder.dtype, threads, target)
        arena = Arena()
        for layer in decoder.layers:
            for site in layer.sites.values():
                site.parts = tuple(tiled(p, self.native, arena) for p in site.parts)
        tied = decoder.head is decoder.embedding
        decoder.embedding = tiled(decoder.embedding, self.native, arena)
        decoder.head = decoder.embedding if tied else tiled(decoder.head, self.native, arena)
        shape = decoder.shape
        self._kept: list[NativeLinear] = []
        layers = [self._layer(i) for i in range(shape.layers)]
        self._layers = (LayerStruct * shape.layers)(*layers)
        self._ranks = np.zeros(slots.slots, np.int32)
        self._has_dora = np.zeros(slots.slots, np.int32)
        self._model = ModelStruct(
            *(shape.hidden_size, shape.intermediate_size, shape.layers, shape.heads),
            *(shape.kv_heads, shape.head_dim, shape.vocab_size, max_context),
            shape.sliding_window or 0,
            shape.rms_norm_eps,
            weight_struct(decoder.embedding),
            *(t.data_ptr() for t in (decoder.norm, decoder.cos, decoder.sin)),
            self._linear(Linear((decoder.head,))),
            ctypes.cast(self._layers, ctypes.POINTER(LayerStruct)),
            *(kv.k.shape[2], kv.page_size, slots.slots, slots.max_rank),
            *(self._ranks.ctypes.data, self._has_dora.ctypes.data),
        )
        self._logits = torch.empty(0, shape.vocab_size)
        # float64 [PHASES], where somebody wants to know what steps spend their time on
        self.seconds: npt.NDArray[np.float64] | None = None

    def prepare(self) -> None:
        """Nothing to do."""

    def __call__(self, batch: Seq[Chunk], slot: Callable[[str], int]) -> Logits | None:
        """See Forward."""
        chunks: list[tuple[int, int, int, int, int]] = []
        tokens: list[int] = []
        pages: list[int] = []
        wanted: list[int] = []
        mixed: list[int] = []
        weights: list[float] = []
        for chunk in batch:
            sequence, end = chunk.sequence, chunk.start + chunk.length
            used = -(-end // self._kv.page_size)
            adapters = len(sequence.weights)
            chunks.append((chunk.start, chunk.length, len(pages), len(mixed), adapters))
            tokens += sequence.tokens[chunk.start : end]
            pages += sequence.pages[:used]
            for digest, weight in sequence.weights:
                mixed.append(slot(digest))
                weights.append(weight)
            if chunk.samples:
                wanted.append(len(tokens) - 1)
        self._refresh(mixed)
        logits = self._buffer(len(wanted))
        best, finite = np.empty(len(wanted), np.int32), np.empty(len(wanted), np.int32)
        held = [np.array(x, np.int32) for x in (chunks, tokens, pages, mixed)]
        held += [np.array(weights, np.float32), np.array(wanted, np.int32)]
        step = StepStruct(
            *(len(batch), len(tokens), len(wanted)),
            *(x.ctypes.data for x in held),
            *(logits.data_ptr(), best.ctypes.data, finite.ctypes.data),
            None if self.seconds is None else self.seconds.ctypes.data,
        )
        self.native.forward(self._model, step)
        return Logits.of(logits, best.tolist(), finite.astype(bool).tolist()) if wanted else None

    def _buffer(self, rows: int) -> Tensor:
        """Logits [rows, vocabulary], good until the next step."""
        if rows > len(self._logits):
            self._logits = torch.empty(rows, self._logits.shape[1])
        return self._logits[:rows]

    def _refresh(self, used: Seq[int]) -> None:
        """What loads have changed in the slots that this step uses."""
        slots = self._slots
        for s in used:
            self._ranks[s], self._has_dora[s] = slots.ranks[s], slots.has_dora[s]

    def _linear(self, linear: Linear) -> LinearStruct:
        native = NativeLinear(linear)
        self._kept.append(native)
        return native.struct

    def _layer(self, index: int) -> LayerStruct:
        layer = self._decoder.layers[index]
        norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        sites = [self._linear(layer.sites[name]) for name in SITES]
        struct = LayerStruct(*(None if n is None else n.data_ptr() for n in norms))
        struct.sites = (LinearStruct * len(SITES))(*sites)
        struct.keys, struct.values = self._kv.k[index].data_ptr(), self._kv.v[index].data_ptr()
        for i, name in enumerate(SITES):
            for j, part in enumerate(self._slots.layers[index][name]):
                at = part.a.data_ptr(), part.b.data_ptr(), part.dora.data_ptr()
                struct.projections[i][j] = ProjectionStruct(part.start, part.width, *at)
        return struct
