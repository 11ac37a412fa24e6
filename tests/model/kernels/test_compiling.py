"""Every kernel compiles for cards that are not here: the interpreter alone would not tell."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from mora_serve.model.group_quant import GroupWeight
from mora_serve.model.kernels.activation import swiglu
from mora_serve.model.kernels.four_bit import FourBit, FourBitProduct, Plan, default_plan
from mora_serve.model.kernels.norms import add_norm
from mora_serve.model.kernels.paged_attention import (
    DecodeScratch,
    decode_attention,
    prefill_attention,
)
from mora_serve.model.kernels.rotary import Rotary
from mora_serve.model.quant import NF4Weight
from tests.model.kernels.compiling import SHARED_LIMIT, compiled

META = torch.device("meta")
BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def ints(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def decode(heads, kv_heads, dim, window=None, width=512, dtype=BF16) -> None:
    q, keys = empty(16, heads, dim, dtype=dtype), empty(kv_heads, 4096, 16, dim, dtype=dtype)
    scratch = DecodeScratch.of(16, heads, dim, width * 16, META)
    decode_attention(q, keys, keys, ints(16, width), ints(16), window, q, scratch)


def prefill(heads, kv_heads, dim, window=None, dtype=BF16) -> None:
    q, keys = empty(512, heads, dim, dtype=dtype), empty(kv_heads, 4096, 16, dim, dtype=dtype)
    table, each = ints(4, 512), ints(4)
    prefill_attention(q, keys, keys, table, each, each, each, 512, window, q)


def prefills_after_decodes() -> None:
    """The same chunks where no row decodes, and after some: their tables begin anywhere."""
    q, keys = empty(512, 8, 128), empty(2, 4096, 16, 128)
    table, each = ints(9, 513), ints(9)
    for first in (0, 1, 4):
        rows = slice(first, first + 4)
        parts = table[rows], each[rows], each[rows], each[rows]
        prefill_attention(q, keys, keys, *parts, 512, None, q)


def few_rows() -> None:
    """Numbers of rows that one plan is for, a power of two among them."""
    for rows in (5, 7, 16):
        product(rows, nf4(512, 1024))


def rotary(heads, kv_heads, dim) -> None:
    qkv, angles = empty(16, (heads + 2 * kv_heads) * dim), empty(8192, dim)
    keys, places = empty(kv_heads, 4096, 16, dim), empty(16, dtype=torch.int64)
    layer = Rotary(heads, kv_heads, angles, angles, qkv[0], empty(dim), empty(dim), 1e-6)
    layer(qkv, places, places, empty(16, heads, dim), keys, keys)


def norm(columns: int) -> None:
    h = empty(16, columns)
    add_norm(h, h, h[0], 1e-5, h, h[0])


def nf4(out: int, columns: int) -> NF4Weight:
    return NF4Weight(codes(out, columns), empty(out, columns // 64, dtype=FP32))


def groups(out: int, columns: int, group: int, zeros: bool = True) -> GroupWeight:
    """In no order of their own: inputs are sorted by torch."""
    size = out, -(-columns // group)
    zero = empty(*size, dtype=torch.uint8) if zeros else None
    return GroupWeight(codes(out, columns), empty(*size, dtype=FP32), zero, group)


def codes(out: int, columns: int) -> torch.Tensor:
    return empty(out, columns // 2, dtype=torch.uint8)


def product(
    rows: int, weight: FourBit, lookup: str = "table", plan: Plan | None = None, dtype=BF16
) -> None:
    x = empty(rows, weight.shape[1], dtype=dtype)
    FourBitProduct(META, dtype)(x, weight, plan or default_plan(rows, *weight.shape, lookup))


def dense(weight: FourBit) -> None:
    FourBitProduct(META, BF16).dense(weight, BF16)


LAUNCHES: dict[str, Callable[[], None]] = {
    "decode": partial(decode, 32, 8, 128),
    "decode-window": partial(decode, 28, 4, 128, window=4096),
    "decode-one-split": partial(decode, 4, 4, 16, width=8, dtype=FP32),
    "prefill": partial(prefill, 32, 8, 128),
    "prefill-fp32": partial(prefill, 32, 8, 128, dtype=FP32),
    "prefills": prefills_after_decodes,
    "prefill-wide": partial(prefill, 16, 8, 256, window=4096),
    "norm": partial(norm, 4096),
    "swiglu": lambda: swiglu(empty(16, 2 * 14336), empty(16, 14336), empty(2 * 14336)),
    "rotary": partial(rotary, 28, 4, 80),
    "nf4-one": partial(product, 1, nf4(4096, 14336)),
    "nf4-one-tree": partial(product, 1, nf4(4096, 4096), "tree"),
    "nf4-few": partial(product, 16, nf4(6144, 4096)),
    "nf4-rows": few_rows,
    "nf4-many": partial(product, 256, nf4(6144, 4096), "", Plan(128, 128, 64, 1, "table", 8)),
    "nf4-dense": partial(dense, nf4(6144, 4096)),
    "groups-one": partial(product, 1, groups(4096, 14336, 128), "bits"),
    "groups-one-cast": partial(product, 1, groups(4096, 11008, 11008, zeros=False), "cast"),
    "groups-few": partial(product, 16, groups(6144, 4096, 128), "bits"),
    "groups-few-cast": partial(product, 64, groups(6144, 4096, 32), "cast"),
    "groups-many": partial(product, 256, groups(4096, 14336, 14336, zeros=False), "bits"),
    "groups-half": partial(product, 16, groups(6144, 4096, 64), "bits", dtype=torch.float16),
    "groups-dense": partial(dense, groups(6144, 4096, 128)),
}
# Ampere's and Hopper's tensor cores are compiled for differently, the rest is not.
ON_TENSOR_CORES = (
    *("decode", "prefill", "prefill-wide", "nf4-few", "nf4-many"),
    *("groups-few", "groups-few-cast", "groups-many", "groups-half"),
)
ONCE = ("prefills", "nf4-rows")  # launches that share a binary
ARCHITECTURES = {case: (80, 90) if case in ON_TENSOR_CORES else (90,) for case in LAUNCHES}
ARCHITECTURES["prefill-fp32"] = (86, 90)


@pytest.fixture(scope="module")
def results():
    return compiled(__name__, ARCHITECTURES)


@pytest.mark.parametrize("case", LAUNCHES)
def test_a_launch_compiles_and_fits(results, case: str):
    for architecture in ARCHITECTURES[case]:
        kernels = results[case, architecture]
        assert kernels
        for kernel in kernels:
            assert not kernel.error
            assert kernel.shared <= SHARED_LIMIT[architecture]
            assert kernel.stack <= 256
        on_cores = case in ON_TENSOR_CORES or case in ONCE or case == "decode-window"
        assert kernels[0].tensor_cores == on_cores


@pytest.mark.parametrize("case", ONCE)
def test_a_step_of_other_sizes_compiles_nothing(results, case: str):
    kernels = [k for k in results[case, 90] if k.kernel != "_sum_kernel"]
    assert len(kernels) == 3
    assert len({kernel.binary for kernel in kernels}) == 1


def test_split_rows_take_a_second_launch(results):
    assert [k.kernel for k in results["decode", 90]] == ["_decode_kernel", "_combine_kernel"]
    assert [k.kernel for k in results["decode-one-split", 90]] == ["_decode_kernel"]
