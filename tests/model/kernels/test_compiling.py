"""Every kernel compiles for cards that are not here: the interpreter alone would not tell."""

from __future__ import annotations

import pytest

from tests.model.kernels.compiling import SHARED_LIMIT, Case, compiled

K = "mora_serve.model.kernels"
PAGED = {"table": "*i32", "lengths": "*i32", "scale": "fp32", "table_stride": "i32"}
SPLIT = {"parts": "*fp32", "tops": "*fp32", "totals": "*fp32"}


def pointers(kind: str, *names: str) -> dict[str, str]:
    return {name: f"*{kind}" for name in names}


def decode(kind: str, heads: int, group: int, dim: int, window: int = 0, splits: int = 32) -> Case:
    return Case(
        f"decode-{kind}-{heads}-{group}-{dim}-{window}-{splits}",
        f"{K}.paged_attention:_decode_kernel",
        {**pointers(kind, "q", "keys", "values", "out"), **PAGED, **SPLIT, "head_stride": "i64"},
        {
            "HEADS": heads,
            "GROUP": group,
            "ROWS": 16,
            "DIM": dim,
            "COLUMNS": 1 << (dim - 1).bit_length(),
        }
        | {"PAGE": 16, "WINDOW": window, "SPLITS": splits, "LEAST": 2, "TILE": 64}
        | {"DOT": f"tl.{NAMES[kind]}"},
        {"num_warps": 4, "num_stages": 3},
        ("head_stride",),
    )


def prefill(kind: str, heads: int, group: int, dim: int, window: int = 0) -> Case:
    rows = 64 if dim > 128 else 128
    return Case(
        f"prefill-{kind}-{heads}-{group}-{dim}-{window}",
        f"{K}.paged_attention:_prefill_kernel",
        {**pointers(kind, "q", "keys", "values", "out"), **PAGED, "head_stride": "i64"}
        | pointers("i32", "starts", "contexts"),
        {"HEADS": heads, "GROUP": group, "DIM": dim, "COLUMNS": 1 << (dim - 1).bit_length()}
        | {"PAGE": 16, "WINDOW": window, "ROWS": rows, "TILE": 64 if dim <= 128 else 32}
        | {"DOT": f"tl.{NAMES[kind]}"},
        {"num_warps": 8 if rows == 128 else 4, "num_stages": 2},
        ("head_stride",),
    )


NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
CASES = [
    decode("bf16", 32, 4, 128),
    decode("bf16", 28, 7, 128, window=4096),
    decode("fp32", 4, 1, 16, splits=1),
    Case(
        "combine",
        f"{K}.paged_attention:_combine_kernel",
        {"lengths": "*i32", **SPLIT, "out": "*bf16"},
        {"HEADS": 32, "DIM": 128, "COLUMNS": 128, "ROOM": 32, "WINDOW": 0}
        | {"SPLITS": 32, "LEAST": 2, "TILE": 64},
    ),
    prefill("bf16", 32, 4, 128),
    prefill("bf16", 16, 2, 256, window=4096),
    Case(
        "add_norm",
        f"{K}.norms:_add_norm_kernel",
        {**pointers("bf16", "h", "delta", "weight", "out"), "columns": "i32", "eps": "fp32"},
        {"bias": None, "BLOCK": 4096},
        {"num_warps": 8},
        ("columns",),
    ),
    Case(
        "swiglu",
        f"{K}.activation:_swiglu_kernel",
        {**pointers("bf16", "gate_up", "bias", "out"), "columns": "i32"},
        {"BLOCK": 1024},
        {},
        ("columns",),
    ),
    Case(
        "rotary",
        f"{K}.rotary:_rotary_kernel",
        {
            **pointers("bf16", "qkv", "bias", "q_norm", "k_norm", "cos", "sin"),
            **pointers("bf16", "q", "keys", "values"),
            **pointers("i64", "positions", "places"),
            "head_stride": "i64",
            "eps": "fp32",
        },
        {"HEADS": 32, "KV_HEADS": 8, "DIM": 128, "BLOCK": 4, "HALF": 64},
        {"num_warps": 1},
        ("head_stride",),
    ),
]
ARCHITECTURES = (80, 90)


@pytest.fixture(scope="module")
def results():
    return compiled(CASES, ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_kernel_compiles_and_fits(results, name: str, architecture: int):
    result = results[name, architecture]
    assert not result.error
    assert result.shared <= SHARED_LIMIT[architecture]


def test_half_precision_products_run_on_tensor_cores(results):
    for name in ("decode-bf16-32-4-128-0-32", "prefill-bf16-32-4-128-0"):
        for architecture in ARCHITECTURES:
            assert results[name, architecture].tensor_cores
