"""Many small arrays that a step needs on the device, taken there by one copy.

Each field is a NumPy view of one host buffer, pinned where the device is a card, and a tensor of
one device buffer, which stays where it is: a CUDA graph may read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 128  # bytes; a kernel may read a field by whole lines
_TYPES = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}

Field = tuple[tuple[int, ...], torch.dtype]


class Packed:
    """``fields`` gives names, shapes and types (int32, int64 or float32); the last one may grow.

    Write ``host`` between ``begin`` and ``upload``; then kernels that are launched later on this
    stream find the same numbers in ``device``. All begins as zeros.
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device) -> None:
        offsets, size = {}, 0
        for name, (shape, dtype) in fields.items():
            offsets[name] = size
            nbytes = int(np.prod(shape)) * dtype.itemsize
            size += -(-nbytes // ALIGNMENT) * ALIGNMENT
        cuda = device.type == "cuda"
        self._last = list(offsets)[-1]
        self._start = offsets[self._last]
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=cuda)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._copied: Any = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self.host: dict[str, npt.NDArray[Any]] = {}
        self.device: dict[str, Tensor] = {}
        for name, (shape, dtype) in fields.items():
            start, stop = offsets[name], offsets[name] + int(np.prod(shape)) * dtype.itemsize
            flat = self._host.numpy()[start:stop]
            self.host[name] = flat.view(_TYPES[dtype]).reshape(shape)
            self.device[name] = self._device[start:stop].view(dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Of either buffer."""
        return len(self._host)

    def begin(self) -> dict[str, npt.NDArray[Any]]:
        """The host's arrays, once the last copy from them has ended."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.host

    def upload(self, first: int | None = None) -> None:
        """Start the one copy; of the last field only the ``first`` rows, where that is given."""
        size = len(self._host)
        if first is not None:
            last = self.host[self._last]
            size = self._start + first * last.itemsize * int(np.prod(last.shape[1:]))
        self._device[:size].copy_(self._host[:size], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def image(self, first: int, columns: int) -> bytes:
        """For another process's ``receive``: of the last field, a matrix, a corner of this size."""
        corner = self.host[self._last][:first, :columns]
        return self._host.numpy()[: self._start].tobytes() + corner.tobytes()

    def receive(self, image: bytes, first: int, columns: int) -> None:
        """Take what another of the same fields has, and upload ``first`` rows of the last one.

        Beyond the corner these are what they were.
        """
        self.begin()
        last = self.host[self._last]
        self._host.numpy()[: self._start] = np.frombuffer(image, np.uint8, self._start)
        corner = np.frombuffer(image, last.dtype, offset=self._start)
        last[:first, :columns] = corner.reshape(first, columns)
        self.upload(first)
