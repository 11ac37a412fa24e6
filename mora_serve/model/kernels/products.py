"""Which way to multiply by a 4-bit matrix, by its shape and the number of rows.

Three are known: bitsandbytes' own product, our kernel, which finds a code's value in one of two
ways, and dequantising the matrix for a dense product. Which is fastest depends on the card, so on a
card each is timed once at start, for each shape of the base; nothing is guessed. Equal numbers of
rows always go the same way.
"""

from __future__ import annotations

import logging
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from mora_serve.model.footprint import BLOCK
from mora_serve.model.kernels.capture import captured
from mora_serve.model.kernels.nf4 import MOST_ROWS, NF4Product, default_plan
from mora_serve.model.quant import Linear, NF4Weight, Weight, product

log = logging.getLogger(__name__)

Way = Callable[[NF4Weight, Tensor], Tensor]
Shape = tuple[int, int]

LOOKUPS = ("table", "tree")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
REPEAT = 7
MATRICES = 8  # of one shape that are timed one after another: more than a cache holds


def dense(weight: NF4Weight, x: Tensor) -> Tensor:
    """Dequantise all, multiply densely."""
    return product(x, weight.dequantise(x.dtype))


def bitsandbytes(weight: NF4Weight, x: Tensor) -> Tensor:
    """bitsandbytes' product, which for some shapes is the dense way in one call."""
    out: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x, weight.codes.view(-1, 1), list(weight.shape), weight.absmax.view(-1), BLOCK, "nf4"
    )
    return out


def kernel(product: NF4Product, lookup: str) -> Way:
    """Our own, by its default plan; raises ValueError for more rows than it is for."""

    def way(weight: NF4Weight, x: Tensor) -> Tensor:
        if len(x) > MOST_ROWS:
            raise ValueError(f"{len(x)} rows")
        return product(x, weight, default_plan(len(x), *weight.shape, lookup))

    return way


def known_ways(device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    """Those that there are on this device, for x in ``dtype``; our kernel's are always there."""
    product_ = NF4Product(device, dtype)
    ways: dict[str, Way] = {f"kernel, {name}": kernel(product_, name) for name in LOOKUPS}
    try:
        import bitsandbytes as package  # noqa: F401 - registers torch.ops.bitsandbytes
    except (ImportError, OSError) as e:
        log.warning("bitsandbytes cannot be used (%s): 4-bit products by our own kernel", e)
        return ways
    ways["dense"] = dense
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # since its version 0.50
        ways["bitsandbytes"] = bitsandbytes
    return ways


class Products:
    """Callable as decoder.Product: the fastest way for each matrix and number of rows.

    ``table`` gives, for a shape (out, in), the names of the ways by number of rows ascending; what
    it does not know goes the way of ``default``.
    """

    def __init__(
        self,
        ways: Mapping[str, Way],
        default: str,
        table: Mapping[Shape, Mapping[int, str]] | None = None,
    ) -> None:
        self._ways, self._default = ways, ways[default]
        self.table = dict(table or {})
        self._steps = {shape: sorted(by_rows) for shape, by_rows in self.table.items()}

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out], without the bias."""
        parts = [self.part(part, x) for part in linear.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def part(self, weight: Weight, x: Tensor) -> Tensor:
        """By one matrix."""
        if not isinstance(weight, NF4Weight):
            return weight.matmul(x)
        return self._way(weight.shape, len(x))(weight, x)

    def _way(self, shape: Shape, rows: int) -> Way:
        steps = self._steps.get(shape)
        if not steps:
            return self._default
        return self._ways[self.table[shape][steps[min(bisect_left(steps, rows), len(steps) - 1)]]]


def measure(
    linears: Iterable[Linear],
    dtype: torch.dtype,
    ways: Mapping[str, Way],
    seconds: Callable[[Callable[[], object]], float],
    rows: Sequence[int] = ROWS,
) -> dict[Shape, dict[int, str]]:
    """The fastest way for each 4-bit matrix of ``linears`` with x in ``dtype``, by number of rows.

    ``seconds`` runs its argument and says how long that took; it runs through several matrices of
    one shape, so that none is found in a cache. A way that raises for a shape is left out there.
    Raises RuntimeError where every way does.
    """
    by_shape: dict[Shape, list[NF4Weight]] = {}
    for weight in (part for linear in linears for part in linear.parts):
        if isinstance(weight, NF4Weight):
            by_shape.setdefault(weight.shape, []).append(weight)
    table: dict[Shape, dict[int, str]] = {}
    for shape, weights in by_shape.items():
        table[shape] = {}
        for n in rows:
            x = torch.randn(n, shape[1], device=weights[0].codes.device).to(dtype)
            table[shape][n] = fastest(
                {name: _time(way, weights[:MATRICES], x, seconds) for name, way in ways.items()}
            )
        log.info("4-bit products of %s by rows: %s", shape, table[shape])
    return table


def fastest(took: Mapping[str, float | None]) -> str:
    """The name with the least time; None stands for a way that cannot."""
    able = {name: t for name, t in took.items() if t is not None}
    if not able:
        raise RuntimeError("no way to multiply by a 4-bit matrix works here")
    return min(able, key=able.__getitem__)


def _time(
    way: Way,
    weights: Sequence[NF4Weight],
    x: Tensor,
    seconds: Callable[[Callable[[], object]], float],
) -> float | None:
    def work() -> None:
        for weight in weights:
            way(weight, x)

    try:
        work()  # compiles, and finds out whether it can
        return seconds(work)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TritonError) as e:
        log.info("a way of 4-bit products does not take %s: %s", weights[0].shape, e)
        return None


def card_seconds(work: Callable[[], object]) -> float:
    """Seconds that the card takes for ``work``, as a graph: launches from Python do not count."""
    graph = captured(work)
    event: Any = torch.cuda.Event
    events = [event(enable_timing=True) for _ in range(2)]
    took = []
    for _ in range(REPEAT):
        events[0].record()
        graph.replay()
        events[1].record()
        events[1].synchronize()
        took.append(1e-3 * float(events[0].elapsed_time(events[1])))
    return statistics.median(took)
