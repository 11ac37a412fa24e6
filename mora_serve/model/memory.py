"""Memory for what a step reads from end to end: weights, adapter slots, keys and values.

In huge pages, where the system gives them to those who ask (Linux, transparent huge pages):
a processor reads them much faster than pages of 4 kB, of which it remembers too few.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
ALIGNMENT = 64  # bytes; a cache line, and the widest register
BLOCK_BYTES = 1 << 26
# Python's default is memory to be shared with other processes, which gets no huge pages.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


class Arena:
    """Hands out zeroed tensors side by side; a block is freed when the last of its tensors is."""

    def __init__(self) -> None:
        self._block: Tensor = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def zeros(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    ) -> Tensor:
        """A tensor of zeros; on the CPU its memory is taken as it is first written."""
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._block) - self._used:
            self._block, self._used = _pages(max(size, BLOCK_BYTES)), 0
        out = self._block[self._used : self._used + size].view(dtype).view(shape)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return out

    def copy(self, tensor: Tensor) -> Tensor:
        """The same numbers, in a row, here."""
        return self.zeros(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _pages(size: int) -> Tensor:
    memory = mmap.mmap(-1, size + HUGE_PAGE, **_PRIVATE)
    bytes_ = torch.frombuffer(memory, dtype=torch.uint8)
    start = -bytes_.data_ptr() % HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them: small pages, the same numbers
            memory.madvise(mmap.MADV_HUGEPAGE)
    return bytes_[start : start + size]
