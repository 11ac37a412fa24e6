"""Bytes of a base, of adapter slots and of the key/value cache, from a shape alone.

No torch here: these are the formulas by which tensors are made elsewhere, and by which plans are
calculated.
"""

from __future__ import annotations

import math

from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import PROJECTIONS, ModelShape

GIB = 1 << 30
BLOCK = 64  # weights that share an absmax in NF4
GPTQ_GROUP = 128  # weights of a row that share a scale in GPTQ
NF4_BITS = 4 + 32 / BLOCK  # a weight, with absmax in float32
CUDA_BYTES = 3 * GIB // 2  # context, kernels, fragmentation, about
CARDS = {"h200": 141, "h100": 80, "a100": 80, "a100-40": 40, "l40s": 48, "a10": 24, "4090": 24}


def card_bytes(text: str) -> int:
    """The memory of a card by its name or in GiB. Raises InvalidArgument."""
    try:
        size = float(CARDS.get(text.lower(), text))
    except ValueError:
        size = math.nan
    if not 0 < size < 1 << 20:
        raise InvalidArgument(
            f"card: {text!r} is neither GiB nor one of {', '.join(CARDS)}", field="card"
        )
    return int(size * GIB)


def can_quantise(rows: int, columns: int) -> bool:
    """Whether the 4-bit kernels take a matrix of this shape; others stay dense."""
    return rows % 32 == 0 and columns % BLOCK == 0


def weight_bytes(rows: int, columns: int, quantization: str, itemsize: int) -> int:
    """A projection's weight: 'nf4', 'gptq' (4 bits, groups of 128) or 'none'.

    GPTQ: codes, scales in 16 bits, zeros in 4, and each column's group in 32.
    """
    count = rows * columns
    if quantization == "nf4" and can_quantise(rows, columns):
        return count // 2 + count // BLOCK * 4
    if quantization == "gptq":
        groups = rows * -(-columns // GPTQ_GROUP)
        return count // 2 + groups * 2 + groups // 2 + columns * 4
    return count * itemsize


def linear_bytes(shape: ModelShape, quantization: str, itemsize: int) -> int:
    """The weights of all projections."""
    sizes = map(shape.projection, PROJECTIONS)
    return shape.layers * sum(weight_bytes(*size, quantization, itemsize) for size in sizes)


def small_bytes(shape: ModelShape, itemsize: int) -> int:
    """Norms, biases, and the tables of cosines and sines."""
    rope = 2 * shape.max_positions * shape.head_dim
    return (shape.norm_parameters + shape.bias_parameters + rope) * itemsize


def slot_bytes(shape: ModelShape, rank: int, itemsize: int, dtype: str = "auto") -> int:
    """One adapter slot: A and B of every projection, whichever of them an adapter changes.

    ``dtype`` is adapters.dtype; in int8 each rank of a projection has a scale in 32 bits.
    """
    if dtype == "int8":
        return shape.adapter_parameters(rank) + shape.layers * len(PROJECTIONS) * rank * 4
    return shape.adapter_parameters(rank) * itemsize


def dora_bytes(shape: ModelShape, itemsize: int) -> int:
    """DoRA's scales of one slot: from the start on a card, elsewhere once one is written."""
    return shape.layers * sum(shape.projection(p)[0] for p in PROJECTIONS) * itemsize


def kv_token_bytes(shape: ModelShape, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * itemsize
