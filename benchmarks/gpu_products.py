"""Products by 4-bit matrices on a card by every way there is: NF4, and the groups of GPTQ and AWQ.

The matrices are those of one layer, random, several of a size one after another, so that none is
found in a cache. Each time is given for one product, beside that of its bytes copied. What a way
computes is compared with float32 first, and with itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.gpu_base import random_groups, random_nf4
from benchmarks.report import log
from mora_serve.model.group_quant import GroupWeight
from mora_serve.model.kernels.four_bit import FourBit
from mora_serve.model.kernels.products import MATRICES, Way, known_ways, times
from mora_serve.model.quant import Linear, by_table
from mora_serve.model.shape import SITES, ModelShape

Make = Callable[[int, int, torch.device], FourBit]
KINDS: Mapping[str, Make] = {
    "nf4": random_nf4,
    "groups of 128": random_groups,
    "groups of 128, in act-order": partial(random_groups, ordered=True),
}
ROWS = (1, 16, 64, 256)
CHECKED = (1, 5)  # rows that are compared
# Of the whole result's norm: weights and result are each rounded to the type once
ROUNDINGS = 2


def measure(
    shape: ModelShape,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    seconds: Callable[[Callable[[], object]], float],
    rows: Sequence[int] = ROWS,
    sites: Sequence[str] = tuple(SITES),
    matrices: int = MATRICES,
) -> dict[str, Any]:
    """Every kind and site; ``bandwidth`` is in bytes a second. See times for ``seconds``.

    A way that raises where it should not is in ``refused`` with the reason, by its name and kind.
    """
    ways = known_ways(device, dtype)
    found: list[dict[str, Any]] = []
    errors: list[float] = []
    refused: dict[str, str] = {}
    repeats = True
    for site in sites:
        sizes = [shape.projection(name) for name in SITES[site]]
        out, columns = sum(size for size, _ in sizes), sizes[0][1]
        for kind, make in KINDS.items():
            weights = [make(out, columns, device) for _ in range(matrices)]
            able = {}
            for name, way in ways.items():
                try:
                    error, repeated = _checked(way, weights[0], dtype)
                except torch.OutOfMemoryError:
                    raise
                except (ValueError, ImportError):  # not for this weight, or not here
                    continue
                except (RuntimeError, TritonError) as e:
                    refused[f"{name}: {kind}"] = f"{type(e).__name__}: {e}"[:200]
                    continue
                able[name] = way
                errors.append(error)
                repeats &= repeated
            ((_, by_rows),) = times([Linear((w,)) for w in weights], dtype, able, seconds, rows)
            for count, took in by_rows.items():
                floor = (weights[0].nbytes + dtype.itemsize * count * (out + columns)) / bandwidth
                measured = {name: time for name, time in took.items() if time is not None}
                best = min(measured, key=measured.__getitem__)
                row = {"kind": kind, "site": site, "out": out, "in": columns, "rows": count}
                row |= {"seconds": measured, "fastest": best, "floor_seconds": floor}
                found.append({**row, "over_floor": measured[best] / floor})
                log(f"{kind}, {site}, {count} rows: {best}, {found[-1]['over_floor']:.2f} x floor")
            del weights, able
            gc.collect()
    return {
        "rows": found,
        "refused": refused,
        "largest_error": max(errors),
        "within_rounding": max(errors) <= ROUNDINGS * torch.finfo(dtype).eps
        and not any(name.startswith("kernel") for name in refused),
        "repeats": repeats,
    }


def _checked(way: Way, weight: FourBit, dtype: torch.dtype) -> tuple[float, bool]:
    """How far products are from float64's, relative, and whether each is the same a second time."""
    g = torch.Generator().manual_seed(0)
    exact = _exact(weight).double()
    errors, repeats = [], True
    for rows in CHECKED:
        x = torch.randn(rows, weight.shape[1], generator=g).to(exact.device, dtype)
        got, again = way(weight, x), way(weight, x)
        want = x.double() @ exact.T
        errors.append(float((got.double() - want).norm() / want.norm()))
        repeats &= torch.equal(got, again)
    return max(errors), repeats


def _exact(weight: FourBit) -> torch.Tensor:
    """The matrix in float32, by plain torch."""
    if isinstance(weight, GroupWeight):
        return weight.dequantise(torch.float32)
    return by_table(weight.codes, weight.absmax, torch.float32)
