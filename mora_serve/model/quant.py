"""The weight of one linear layer: 4-bit NF4 or dense, with ``matmul`` and ``dequantise``.

Nothing else in the project touches bitsandbytes' states. A 4-bit weight is kept as packed codes
and *un-nested* float32 absmax (4.5 bits a parameter): only so is the concatenation of rows exact,
which fuses q/k/v and gate/up. Nested (double-quantised) checkpoints are un-nested as they load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.errors import ConfigError
from mora_serve.model.footprint import BLOCK

# Dequantised rows at a time: small enough to stay in the cache and to be reused by the allocator,
# where one large buffer a call would be mapped and faulted in anew (4x slower on the CPU).
CHUNK_ELEMENTS = 1 << 20
# Elements quantised at a time on a card, which fills it, and is little beside one layer in 16 bits.
CARD_CHUNK_ELEMENTS = 1 << 24

# What NF4's codes stand for, in bitsandbytes' order.
VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)

# MKL computes the last rows of a product whose number of rows is not a multiple of its tile with
# other kernels, which round otherwise. Equal rows of one batch must give equal bits.
ROW_TILE = 16


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [rows, in] -> x @ weight.T [rows, out]; equal rows of x give equal bits, wherever.

    Except in training, where nobody compares bits and a copy of x would cost.
    """
    rows = x.shape[0]
    missing = -rows % ROW_TILE
    if x.is_cuda or x.requires_grad or rows == 1 or not missing:
        return F.linear(x, weight)
    return F.linear(F.pad(x, (0, 0, 0, missing)), weight)[:rows]


@dataclass(slots=True)
class DenseWeight:
    """A plain [out, in] matrix."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.weight.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out]."""
        return product(x, self.weight)

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``."""
        return self.weight[start:stop].to(dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by index [n] int64 -> [n, in] in ``dtype``."""
        return F.embedding(indices, self.weight).to(dtype)

    def stacked(self, below: object) -> Self | None:
        """See Stackable."""
        if not isinstance(below, DenseWeight):
            return None
        return type(self)(torch.cat([self.weight, below.weight]))


def by_chunks(
    x: Tensor, shape: tuple[int, int], dequantise: Callable[[torch.dtype, int, int], Tensor]
) -> Tensor:
    """x [rows, in] -> x @ W.T [rows, out], W [out, in] being dequantised some rows at a time."""
    rows, columns = shape
    step = max(1, CHUNK_ELEMENTS // columns)
    if rows <= step or x.is_cuda or x.requires_grad:
        return product(x, dequantise(x.dtype, 0, rows))
    out = x.new_empty(x.shape[0], rows)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        out[:, start:stop] = product(x, dequantise(x.dtype, start, stop))
    return out


@dataclass(slots=True)
class NF4Weight:
    """A [out, in] matrix in NF4: ``codes`` uint8 [out, in/2], ``absmax`` float32 [out, in/64]."""

    codes: Tensor
    absmax: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        return self.codes.nbytes + self.absmax.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out], a chunk of output rows at a time."""
        return by_chunks(x, self.shape, self.dequantise)

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``; slower where there is no bitsandbytes."""
        codes, absmax = self.codes[start:stop], self.absmax[start:stop]
        try:
            import bitsandbytes  # noqa: F401 - registers torch.ops.bitsandbytes
        except (ImportError, OSError):
            return by_table(codes, absmax, dtype)
        out: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            codes.reshape(-1, 1),
            absmax.reshape(-1),
            self.shape[1] // absmax.shape[1],
            "nf4",
            (codes.shape[0], self.shape[1]),
            dtype,
        )
        return out

    def stacked(self, below: object) -> Self | None:
        """See Stackable."""
        if not isinstance(below, NF4Weight) or below.absmax.shape[1] != self.absmax.shape[1]:
            return None
        return type(self)(
            torch.cat([self.codes, below.codes]), torch.cat([self.absmax, below.absmax])
        )


def by_table(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix of an NF4Weight's codes and absmax in ``dtype``, by plain torch.

    A few rows at a time: indices take eight times the memory of the codes.
    """
    rows, columns = codes.shape[0], 2 * codes.shape[1]
    values = torch.tensor(VALUES, device=codes.device)
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    step = max(1, (CARD_CHUNK_ELEMENTS if codes.is_cuda else CHUNK_ELEMENTS) // columns)
    for start in range(0, rows, step):
        part, scale = codes[start : start + step], absmax[start : start + step]
        both = torch.stack([part >> 4, part & 15], dim=-1).view(*scale.shape, -1)
        out[start : start + step] = (values[both.int()] * scale[..., None]).flatten(1)
    return out


class Weight(Protocol):
    """A [out, in] matrix, however it is stored."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes resident."""
        ...

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out]."""
        ...

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start..stop of the matrix in ``dtype``."""
        ...


class Stackable(Weight, Protocol):
    """A weight as it is loaded, which may become one with its neighbours."""

    def stacked(self, below: object) -> Self | None:
        """Both matrices as one, ``below``'s rows after these; None where they are not of a kind."""
        ...


class Table(Weight, Protocol):
    """A matrix whose rows are looked up: an embedding, which may also be the head."""

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by index [n] int64 -> [n, in] in ``dtype``."""
        ...


@dataclass(slots=True)
class Linear:
    """One fused linear layer: parts stacked along the output, and a bias over all of them."""

    parts: tuple[Weight, ...]
    bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes resident, bias apart."""
        return sum(p.nbytes for p in self.parts)

    def matmul(self, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out], without the bias."""
        if len(self.parts) == 1:
            return self.parts[0].matmul(x)
        return torch.cat([p.matmul(x) for p in self.parts], dim=-1)

    def dense(self, dtype: torch.dtype) -> Linear:
        """The same layer as one dense matrix in ``dtype``."""
        return Linear((DenseWeight(self.dequantise(dtype)),), self.bias)

    def dequantise(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Output rows start..stop of the whole matrix in ``dtype``."""
        pieces, offset = [], 0
        if stop is None:
            stop = sum(part.shape[0] for part in self.parts)
        for part in self.parts:
            rows = part.shape[0]
            low, high = max(start - offset, 0), min(stop - offset, rows)
            if low < high:
                pieces.append(part.dequantise(dtype, low, high))
            offset += rows
        return torch.cat(pieces)


def fuse(parts: Sequence[Stackable], bias: Tensor | None = None) -> Linear:
    """Stack weights along the output; neighbours of one kind become one weight."""
    merged: list[Stackable] = []
    for part in parts:
        both = merged[-1].stacked(part) if merged else None
        if both is None:
            merged.append(part)
        else:
            merged[-1] = both
    return Linear(tuple(merged), bias)


def quantise(weight: Tensor) -> NF4Weight:
    """Quantise a [out, in] matrix to NF4 where it is, a few rows at a time.

    Each chunk is taken in float32, and bitsandbytes' CPU quantiser needs 16 times the memory of
    its input; blocks of 64 are independent, so chunks of rows give the same codes.
    """
    import bitsandbytes.functional as bnb

    rows, columns = weight.shape
    chunk = CHUNK_ELEMENTS if weight.device.type == "cpu" else CARD_CHUNK_ELEMENTS
    step = max(1, chunk // columns)
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, columns // BLOCK, dtype=torch.float32, device=weight.device)
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        packed, state = bnb.quantize_4bit(
            part, blocksize=BLOCK, quant_type="nf4", compress_statistics=False
        )
        codes[start : start + step] = packed.view(part.shape[0], -1)
        absmax[start : start + step] = state.absmax.view(part.shape[0], -1)
    return NF4Weight(codes, absmax)


def from_checkpoint(codes: Tensor, state: dict[str, Any], name: str) -> NF4Weight:
    """Take a weight that bitsandbytes stored in a checkpoint, un-nesting its absmax.

    ``state`` holds the tensors stored beside ``codes`` (absmax, quant_map, nested_*, and the
    packed quant_state). Both results are copies: what is read from a mapped file would change
    with the file. Codes may be stored under another type of the same bits. Raises ConfigError for
    4-bit types other than NF4.
    """
    import bitsandbytes.functional as bnb

    quant_state = bnb.QuantState.from_dict(dict(state), device=codes.device)
    if quant_state.quant_type != "nf4":
        raise ConfigError(
            f"base.model: {name} is stored as {quant_state.quant_type}; only nf4 is supported",
            field="base.model",
        )
    absmax = quant_state.absmax
    if quant_state.nested:
        absmax = bnb.dequantize_blockwise(absmax, quant_state.state2) + quant_state.offset
    rows, columns = quant_state.shape
    if columns % quant_state.blocksize:
        raise ConfigError(
            f"base.model: {name} has {columns} columns, not a multiple of its block size "
            f"{quant_state.blocksize}",
            field="base.model",
        )
    return NF4Weight(
        codes.contiguous().view(torch.uint8).reshape(rows, columns // 2).clone(),
        absmax.float().reshape(rows, -1).clone(),
    )
