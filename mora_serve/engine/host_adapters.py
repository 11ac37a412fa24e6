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
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import AdapterSlots, dora_scale
from mora_serve.model.native.library import FILE_TYPES, PieceStruct, library
from mora_serve.model.shape import SITES

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


class HostAdapters:
    """Converts adapters and keeps up to ``limit`` bytes of them; for the loading thread alone.

    ``open_adapter`` gives an adapter's content (raises MoraError when it is gone).
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: AdapterSlots,
        open_adapter: Callable[[str], ValidatedAdapter],
        limit: int,
    ) -> None:
        self.nbytes = 0
        self._decoder, self._slots, self._open = decoder, slots, open_adapter
        self._limit = limit
        self._kept: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first
        self._dora: OrderedDict[str, dict[tuple[int, str], Tensor]] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        """Whether an adapter is here converted; any thread may ask."""
        return digest in self._kept

    @torch.no_grad()
    def get(self, digest: str) -> HostAdapter:
        """An adapter, converted now where it is not here. Raises what ``open_adapter`` raises."""
        found = self._kept.get(digest)
        if found is not None:
            self._kept.move_to_end(digest)
            return found
        made = self._convert(digest, self._open(digest))
        if made.nbytes <= self._limit:
            self._kept[digest] = made
            self.nbytes += made.nbytes
            while self.nbytes > self._limit:
                self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return made

    def _convert(self, digest: str, adapter: ValidatedAdapter) -> HostAdapter:
        sizes = [
            (m.a.shape[0] * m.a.shape[1], m.b.shape[0] * m.b.shape[1]) for m in adapter.modules
        ]
        packed = torch.empty(
            sum(map(sum, sizes)),
            dtype=self._slots.dtype,
            pin_memory=self._slots.device.type == "cuda",
        )
        parts, start = [], 0
        for module, (a_size, b_size) in zip(adapter.modules, sizes, strict=True):
            middle, end = start + a_size, start + a_size + b_size
            a = packed[start:middle].view(module.a.shape)
            parts.append((module, a, packed[middle:end].view(module.rank, -1)))
            start = end
        file = _Tensors(adapter)
        file.unpack(parts)
        scales = self._dora.pop(digest, {})
        modules = []
        for module, a, b in parts:
            key = module.layer, module.projection
            if module.magnitude is not None and key not in scales:
                scales[key] = self._scale(module, module.magnitude, file)
            modules.append(HostModule(*key, a, b, scales.get(key)))
        if scales:
            self._dora[digest] = scales
            if len(self._dora) > DORA_KEPT:
                self._dora.popitem(last=False)
        nbytes = packed.nbytes + sum(s.nbytes for s in scales.values())
        return HostAdapter(adapter.rank, adapter.dora, adapter.nbytes, nbytes, tuple(modules))

    def _scale(self, module: LoraModule, magnitude: TensorRef, file: _Tensors) -> Tensor:
        """c - 1 of a DoRA module."""
        site = next(s for s, names in SITES.items() if module.projection in names)
        part = self._slots.projection(module.layer, module.projection)
        linear = self._decoder.layers[module.layer].sites[site]
        weight = linear.dequantise(torch.float32, part.start, part.start + part.width)
        b = file[module.b].float().T * module.scaling
        parts = file[module.a], b, file[magnitude].flatten()
        scale = (dora_scale(weight, *(t.to(weight.device) for t in parts)) - 1).cpu()
        return scale.pin_memory() if self._slots.device.type == "cuda" else scale


class _Tensors:
    """The tensors of an adapter's file."""

    def __init__(self, adapter: ValidatedAdapter) -> None:
        self._file = np.frombuffer(adapter.weights, np.uint8)

    def unpack(self, parts: Sequence[tuple[LoraModule, Tensor, Tensor]]) -> None:
        """Fill each module's A [rank, in] and B [rank, out], the scaling in it.

        In float32, so that each number is rounded once, whatever the file's type.
        """
        lib = library()
        if lib is None:
            for module, a, b in parts:
                a.copy_(self[module.a])
                torch.mul(self[module.b].float().T, module.scaling, out=b)
            return
        start = self._file.ctypes.data
        pieces = []
        for module, a, b in parts:
            bf16 = a.dtype == torch.bfloat16
            for ref, to, transposed in ((module.a, a, False), (module.b, b, True)):
                kind, scale = FILE_TYPES.index(ref.dtype), module.scaling if transposed else 1.0
                address = start + ref.start, to.data_ptr()
                pieces.append(PieceStruct(*address, kind, *ref.shape, transposed, bf16, scale))
        lib.mora_unpack((PieceStruct * len(pieces))(*pieces), len(pieces))

    def __getitem__(self, ref: TensorRef) -> Tensor:
        dtype = DTYPES[ref.dtype]
        # A copy: a mapped file is read-only, and need not be aligned.
        return torch.from_numpy(self._file[ref.start : ref.end].copy()).view(dtype).view(ref.shape)
