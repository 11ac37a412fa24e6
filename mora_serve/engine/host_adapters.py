"""Adapters on the host, as the slots want them: a load is then one copy a tensor.

Opening a file, parsing its header and rounding its tensors costs several times what the copy into
a slot does. So what was converted is kept, up to a number of bytes, the least recently used going
first; and it can be converted before there is a slot for it.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mora_serve.adapters.validate import LoraModule, TensorRef, ValidatedAdapter
from mora_serve.engine.followers import ALONE, Followers, Total
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import AdapterSlots, dora_norm
from mora_serve.model.memory import ALIGNMENT
from mora_serve.model.native.library import FILE_TYPES, PieceStruct, library
from mora_serve.model.shape import SITES
from mora_serve.model.shard import is_summed

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Adapters whose DoRA scales are kept besides: each takes passes over the whole base to make.
DORA_KEPT = 256


@dataclass(frozen=True, slots=True)
class HostModule:
    """One projection's part: ``rows`` [rank, ...] are what its slots' ``tensors`` are to hold.

    ``dora`` [out] holds c - 1 (see model/lora.py).
    """

    layer: int
    projection: str
    rows: tuple[Tensor, ...]
    dora: Tensor | None = None

    @property
    def rank(self) -> int:
        """Of this projection."""
        return len(self.rows[0])


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter converted; ``nbytes`` are what it takes here, and what a load copies."""

    rank: int
    dora: bool
    nbytes: int
    modules: tuple[HostModule, ...]


class Converter:
    """Converts adapters, or this rank's part of them where ranks share the base. For one thread."""

    def __init__(self, decoder: Decoder, slots: AdapterSlots) -> None:
        self._decoder, self._slots = decoder, slots
        self._dora: OrderedDict[str, dict[tuple[int, str], Tensor]] = OrderedDict()

    @torch.no_grad()
    def convert(self, digest: str, adapter: ValidatedAdapter, total: Total) -> HostAdapter:
        """An adapter as the slots want it.

        DoRA's norms are of whole rows: where ranks have parts of these, ``total`` adds up squares
        [n] over all ranks; it is called once at most.
        """
        pieces = [_Piece(m, *self._part(m)) for m in adapter.modules]
        slots = [self._slots.projection(*piece.key) for piece in pieces]
        pinned = self._slots.device.type == "cuda"
        rows = _rows_like([p.tensors for p in slots], [m.rank for m in adapter.modules], pinned)
        file, whole = _Tensors(adapter), self._decoder.shard is None
        for piece, part, own in zip(pieces, slots, rows, strict=True):
            part.encode(own, partial(file.unpack, piece, whole))
        scales = self._dora.pop(digest, None)
        if adapter.dora and scales is None:
            dora = [p for p in pieces if p.module.magnitude is not None]
            scales = self._scales(dora, file, total)
        if scales:
            self._dora[digest] = scales
            if len(self._dora) > DORA_KEPT:
                self._dora.popitem(last=False)
        scales = scales or {}
        modules = tuple(
            HostModule(*p.key, own, scales.get(p.key)) for p, own in zip(pieces, rows, strict=True)
        )
        nbytes = sum(t.nbytes for t in (*itertools.chain(*rows), *scales.values()))
        return HostAdapter(adapter.rank, adapter.dora, nbytes, modules)

    def forget(self, digest: str) -> None:
        """What an adapter's DoRA scales were."""
        self._dora.pop(digest, None)

    def _part(self, module: LoraModule) -> tuple[slice, slice]:
        if self._decoder.shard is not None:
            return self._decoder.shard.part(module.projection)
        return slice(0, module.b.shape[0]), slice(0, module.a.shape[1])

    def _scales(
        self, pieces: Sequence[_Piece], file: _Tensors, total: Total
    ) -> dict[tuple[int, str], Tensor]:
        """c - 1 of each DoRA module."""
        norms = [self._norm(piece, file) for piece in pieces]
        if self._decoder.shard is not None:
            summed = [i for i, p in enumerate(pieces) if is_summed(p.module.projection)]
            if summed:
                squares = torch.cat([norms[i].square() for i in summed])
                sizes = [len(norms[i]) for i in summed]
                for i, squared in zip(summed, torch.split(total(squares), sizes), strict=True):
                    norms[i] = squared.sqrt()
        scales = {}
        for piece, norm in zip(pieces, norms, strict=True):
            if piece.module.magnitude is not None:
                magnitude = file[piece.module.magnitude].flatten()[piece.rows].float()
                scale = magnitude / norm - 1
                pinned = self._slots.device.type == "cuda"
                scales[piece.key] = scale.pin_memory() if pinned else scale
        return scales

    def _norm(self, piece: _Piece, file: _Tensors) -> Tensor:
        """Of this rank's part of the rows."""
        module = piece.module
        site = next(s for s, names in SITES.items() if module.projection in names)
        slot = self._slots.projection(module.layer, module.projection)
        linear = self._decoder.layers[module.layer].sites[site]
        weight = linear.dequantise(torch.float32, slot.start, slot.start + slot.width)
        a = file[module.a][:, piece.columns]
        b = file[module.b][piece.rows].float().T * module.scaling
        return dora_norm(weight, *(t.to(weight.device) for t in (a, b))).cpu()


class HostAdapters:
    """Converts adapters and keeps up to ``limit`` bytes of them; for the loading thread alone.

    ``open_adapter`` gives an adapter's content (raises MoraError when it is gone); ``followers``
    convert and keep the same.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: AdapterSlots,
        open_adapter: Callable[[str], ValidatedAdapter],
        limit: int,
        followers: Followers = ALONE,
    ) -> None:
        self.nbytes = 0
        self._converter = Converter(decoder, slots)
        self._open, self._limit, self._followers = open_adapter, limit, followers
        self._kept: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first

    def __contains__(self, digest: str) -> bool:
        """Whether an adapter is here converted; any thread may ask."""
        return digest in self._kept

    def get(self, digest: str) -> HostAdapter:
        """An adapter, converted now where it is not here. Raises what ``open_adapter`` raises."""
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
            return found
        adapter = self._open(digest)
        with self._followers.converting(digest, adapter) as total:
            made = self._converter.convert(digest, adapter, total)
        if made.nbytes <= self._limit:
            self._kept[digest] = made
            self._followers.keep(digest)
            self.nbytes += made.nbytes
            while self.nbytes > self._limit:
                old, dropped = self._kept.popitem(last=False)
                self._followers.drop(old)
                self.nbytes -= dropped.nbytes
        return made

    def forget(self, digest: str) -> None:
        """All that is kept of an adapter, here and at the followers: something went wrong."""
        self._converter.forget(digest)
        if digest in self._kept:
            self.nbytes -= self._kept.pop(digest).nbytes
        self._followers.forget(digest)


@dataclass(frozen=True, slots=True)
class _Piece:
    """The rows and columns of a module that are wanted."""

    module: LoraModule
    rows: slice
    columns: slice

    @property
    def key(self) -> tuple[int, str]:
        return self.module.layer, self.module.projection


def _rows_like(
    slots: Sequence[Sequence[Tensor]], ranks: Sequence[int], pinned: bool
) -> list[tuple[Tensor, ...]]:
    """For each module ``rank`` rows of one slot of each of its tensors, side by side in memory."""
    places, end = [], 0
    for tensors, rank in zip(slots, ranks, strict=True):
        for tensor in tensors:
            shape = rank, *tensor.shape[2:]
            start, size = end // tensor.itemsize, math.prod(shape)
            places.append((tensor.dtype, slice(start, start + size), shape))
            end += -(-size * tensor.itemsize // ALIGNMENT) * ALIGNMENT
    memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    typed = {dtype: memory.view(dtype) for dtype, _, _ in places}
    rows = (typed[dtype][place].view(shape) for dtype, place, shape in places)
    return [tuple(itertools.islice(rows, len(tensors))) for tensors in slots]


class _Tensors:
    """The tensors of an adapter's file."""

    def __init__(self, adapter: ValidatedAdapter) -> None:
        self._file = np.frombuffer(adapter.weights, np.uint8)
        self._start = int(self._file.ctypes.data)

    def unpack(self, piece: _Piece, whole: bool, a: Tensor, b: Tensor) -> None:
        """Write a piece's A [rank, columns] and B [rank, rows], the scaling in it.

        In float32, so that each number is rounded once, whatever the file's type. ``whole``: it is
        a whole module.
        """
        lib, module = library(), piece.module
        if lib is None or not whole:
            a.copy_(self[module.a][:, piece.columns])
            b.copy_(self[module.b][piece.rows].float().T * module.scaling)
            return
        structs = []
        for ref, to, transposed in ((module.a, a, False), (module.b, b, True)):
            kind, scale = FILE_TYPES.index(ref.dtype), module.scaling if transposed else 1.0
            address, bf16 = (self._start + ref.start, to.data_ptr()), to.dtype == torch.bfloat16
            structs.append(PieceStruct(*address, kind, *ref.shape, transposed, bf16, scale))
        lib.mora_unpack((PieceStruct * len(structs))(*structs), len(structs))

    def __getitem__(self, ref: TensorRef) -> Tensor:
        dtype = DTYPES[ref.dtype]
        # A copy: a mapped file is read-only, and need not be aligned.
        return torch.from_numpy(self._file[ref.start : ref.end].copy()).view(dtype).view(ref.shape)
