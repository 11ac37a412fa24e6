"""Adapters on the host, as the slots want them: a load is then one copy a tensor.

Opening a file, parsing its header and rounding its tensors costs several times what the copy into
a slot does. So what was converted is kept, up to a number of bytes, the least recently used going
first; and it can be converted before there is a slot for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mora_serve.adapters.validate import LoraModule, TensorRef, ValidatedAdapter
from mora_serve.engine.followers import ALONE, Followers, Total
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import AdapterSlots, dora_norm
from mora_serve.model.native.library import FILE_TYPES, PieceStruct, library
from mora_serve.model.shape import SITES
from mora_serve.model.shard import is_summed

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Adapters whose DoRA scales are kept besides: each takes passes over the whole base to make.
DORA_KEPT = 256


@dataclass(frozen=True, slots=True)
class HostModule:
    """One projection's part: A [rank, in] and B [rank, out], the scaling in it, in the slots' type.

    ``dora`` [out] holds c - 1 (see model/lora.py).
    """

    layer: int
    projection: str
    a: Tensor
    b: Tensor
    dora: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter converted. ``file_bytes`` is its file's size, ``nbytes`` what it takes here."""

    rank: int
    dora: bool
    file_bytes: int
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
        parts = [self._part(m) for m in adapter.modules]
        sizes = [
            (m.rank * _length(columns), m.rank * _length(rows))
            for m, (rows, columns) in zip(adapter.modules, parts, strict=True)
        ]
        packed = torch.empty(
            sum(map(sum, sizes)),
            dtype=self._slots.dtype,
            pin_memory=self._slots.device.type == "cuda",
        )
        pieces, start = [], 0
        for module, part, (a_size, b_size) in zip(adapter.modules, parts, sizes, strict=True):
            middle, end = start + a_size, start + a_size + b_size
            a, b = packed[start:middle], packed[middle:end]
            pieces.append(_Piece(module, *part, *(x.view(module.rank, -1) for x in (a, b))))
            start = end
        file = _Tensors(adapter)
        file.unpack(pieces, whole=self._decoder.shard is None)
        scales = self._dora.pop(digest, None)
        if adapter.dora and scales is None:
            dora = [p for p in pieces if p.module.magnitude is not None]
            scales = self._scales(dora, file, total)
        if scales:
            self._dora[digest] = scales
            if len(self._dora) > DORA_KEPT:
                self._dora.popitem(last=False)
        scales = scales or {}
        nbytes = packed.nbytes + sum(s.nbytes for s in scales.values())
        modules = tuple(HostModule(*p.key, p.a, p.b, scales.get(p.key)) for p in pieces)
        return HostAdapter(adapter.rank, adapter.dora, adapter.nbytes, nbytes, modules)

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
    """The rows and columns of a module that are wanted, and where they go."""

    module: LoraModule
    rows: slice
    columns: slice
    a: Tensor  # [rank, columns]
    b: Tensor  # [rank, rows]

    @property
    def key(self) -> tuple[int, str]:
        return self.module.layer, self.module.projection


def _length(part: slice) -> int:
    return int(part.stop - part.start)


class _Tensors:
    """The tensors of an adapter's file."""

    def __init__(self, adapter: ValidatedAdapter) -> None:
        self._file = np.frombuffer(adapter.weights, np.uint8)

    def unpack(self, pieces: Sequence[_Piece], *, whole: bool) -> None:
        """Fill each piece's A and B, the scaling in it; ``whole``: they are whole modules.

        In float32, so that each number is rounded once, whatever the file's type.
        """
        lib = library()
        if lib is None or not whole:
            for piece in pieces:
                module = piece.module
                piece.a.copy_(self[module.a][:, piece.columns])
                piece.b.copy_(self[module.b][piece.rows].float().T * module.scaling)
            return
        start = self._file.ctypes.data
        structs = []
        for piece in pieces:
            module, bf16 = piece.module, piece.a.dtype == torch.bfloat16
            for ref, to, transposed in ((module.a, piece.a, False), (module.b, piece.b, True)):
                kind, scale = FILE_TYPES.index(ref.dtype), module.scaling if transposed else 1.0
                address = start + ref.start, to.data_ptr()
                structs.append(PieceStruct(*address, kind, *ref.shape, transposed, bf16, scale))
        lib.mora_unpack((PieceStruct * len(structs))(*structs), len(structs))

    def __getitem__(self, ref: TensorRef) -> Tensor:
        dtype = DTYPES[ref.dtype]
        # A copy: a mapped file is read-only, and need not be aligned.
        return torch.from_numpy(self._file[ref.start : ref.end].copy()).view(dtype).view(ref.shape)
