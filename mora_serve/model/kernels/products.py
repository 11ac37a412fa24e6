"""Which way to multiply by a 4-bit matrix, by its kind and shape and the number of rows.

Four are known: our kernel, which finds a code's value in one of two ways, a dense product after our
kernel or torch has dequantised the matrix, and for NF4 bitsandbytes' own product. Which is fastest
depends on the card, so on a card each is timed once at start, for each shape of the base; nothing
is guessed. Equal numbers of rows always go the same way.
"""

from __future__ import annotations

import logging
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from mora_serve.model.footprint import BLOCK
from mora_serve.model.kernels.capture import captured
from mora_serve.model.kernels.four_bit import (
    GROUP_LOOKUPS,
    MOST_ROWS,
    NF4_LOOKUPS,
    FourBit,
    FourBitProduct,
    default_plan,
)
from mora_serve.model.quant import Linear, NF4Weight, Weight

log = logging.getLogger(__name__)

Way = Callable[[FourBit, Tensor], Tensor]

TORCH, BY_DENSE, BITSANDBYTES = "dense", "kernel, dense", "bitsandbytes"
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
REPEAT = 7
MATRICES = 8  # of one shape that are timed one after another: more than a cache holds


class Form(NamedTuple):
    """What decides which way is the fastest: the kind of weight and its size."""

    kind: str
    out: int
    columns: int


def form(weight: FourBit) -> Form:
    """``kind`` is nf4, or says how many inputs share a scale."""
    kind = "nf4" if isinstance(weight, NF4Weight) else f"groups of {weight.group}"
    return Form(kind, *weight.shape)


def dense(weight: FourBit, x: Tensor) -> Tensor:
    """Dequantise all by torch (NF4 by bitsandbytes), multiply densely."""
    return weight.matmul(x)


def bitsandbytes(weight: FourBit, x: Tensor) -> Tensor:
    """bitsandbytes' product, which for some shapes is the dense way in one call.

    Raises ValueError for other weights than NF4.
    """
    if not isinstance(weight, NF4Weight):
        raise ValueError("not NF4")
    out: Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x, weight.codes.view(-1, 1), list(weight.shape), weight.absmax.view(-1), BLOCK, "nf4"
    )
    return out


def kernel(product: FourBitProduct, lookup: str) -> Way:
    """Our own, by its default plan; raises ValueError for more rows than it is for."""

    def way(weight: FourBit, x: Tensor) -> Tensor:
        if len(x) > MOST_ROWS:
            raise ValueError(f"{len(x)} rows")
        return product(x, weight, default_plan(len(x), *weight.shape, lookup))

    return way


def known_ways(device: torch.device, dtype: torch.dtype) -> dict[str, Way]:
    """Those that there are on this device, for x in ``dtype``; our kernel's are always there.

    Each raises ValueError for a kind of weight that it is not for.
    """
    product = FourBitProduct(device, dtype)
    lookups = (*NF4_LOOKUPS, *GROUP_LOOKUPS)
    ways: dict[str, Way] = {f"kernel, {lookup}": kernel(product, lookup) for lookup in lookups}
    ways[BY_DENSE] = lambda weight, x: product.by_dense(x, weight)
    ways[TORCH] = dense
    try:
        import bitsandbytes as package  # noqa: F401 - registers torch.ops.bitsandbytes
    except (ImportError, OSError) as e:
        log.warning("bitsandbytes cannot be used (%s): 4-bit products by our own kernels", e)
        return ways
    if hasattr(torch.ops.bitsandbytes, "gemm_4bit"):  # since its version 0.50
        ways[BITSANDBYTES] = bitsandbytes
    return ways


class Products:
    """Callable as decoder.Product: the fastest way for each matrix and number of rows.

    ``table`` gives the names of the ways by number of rows ascending; what it does not know goes
    the way of ``default``.
    """

    def __init__(
        self,
        ways: Mapping[str, Way],
        default: str,
        table: Mapping[Form, Mapping[int, str]] | None = None,
    ) -> None:
        self._ways, self._default = ways, ways[default]
        self.table = dict(table or {})
        self._steps = {key: sorted(by_rows) for key, by_rows in self.table.items()}

    def __call__(self, linear: Linear, x: Tensor) -> Tensor:
        """x [rows, in] -> x @ W.T [rows, out], without the bias."""
        parts = [self.part(part, x) for part in linear.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def part(self, weight: Weight, x: Tensor) -> Tensor:
        """By one matrix."""
        if not isinstance(weight, FourBit):
            return weight.matmul(x)
        return self._way(form(weight), len(x))(weight, x)

    def _way(self, key: Form, rows: int) -> Way:
        steps = self._steps.get(key)
        if not steps:
            return self._default
        return self._ways[self.table[key][steps[min(bisect_left(steps, rows), len(steps) - 1)]]]


def measure(
    linears: Iterable[Linear],
    dtype: torch.dtype,
    ways: Mapping[str, Way],
    seconds: Callable[[Callable[[], object]], float],
    rows: Sequence[int] = ROWS,
) -> dict[Form, dict[int, str]]:
    """The fastest way for each 4-bit matrix of ``linears`` with x in ``dtype``, by number of rows.

    See ``times``. Raises RuntimeError where every way does.
    """
    table: dict[Form, dict[int, str]] = {}
    for key, by_rows in times(linears, dtype, ways, seconds, rows):
        table[key] = {n: fastest(took) for n, took in by_rows.items()}
        log.info("4-bit products of %s by rows: %s", key, table[key])
    return table


def times(
    linears: Iterable[Linear],
    dtype: torch.dtype,
    ways: Mapping[str, Way],
    seconds: Callable[[Callable[[], object]], float],
    rows: Sequence[int],
) -> Iterator[tuple[Form, dict[int, dict[str, float | None]]]]:
    """For each form of 4-bit matrix: by number of rows what each way takes, None where it cannot.

    ``seconds`` runs its argument and says how long that took; it runs through several matrices of
    one form, so that none is found in a cache, and what is given here is for one of them. A way
    that raises is one that cannot.
    """
    by_form: dict[Form, list[FourBit]] = {}
    for weight in (part for linear in linears for part in linear.parts):
        if isinstance(weight, FourBit):
            by_form.setdefault(form(weight), []).append(weight)
    for key, weights in by_form.items():
        by_rows: dict[int, dict[str, float | None]] = {}
        for n in rows:
            x = torch.randn(n, key.columns, device=weights[0].codes.device).to(dtype)
            by_rows[n] = {
                name: _time(way, weights[:MATRICES], x, seconds) for name, way in ways.items()
            }
        yield key, by_rows


def fastest(took: Mapping[str, float | None]) -> str:
    """The name with the least time; None stands for a way that cannot."""
    able = {name: t for name, t in took.items() if t is not None}
    if not able:
        raise RuntimeError("no way to multiply by a 4-bit matrix works here")
    return min(able, key=able.__getitem__)


def _time(
    way: Way,
    weights: Sequence[FourBit],
    x: Tensor,
    seconds: Callable[[Callable[[], object]], float],
) -> float | None:
    def work() -> None:
        for weight in weights:
            way(weight, x)

    try:
        work()  # compiles, and finds out whether it can
        return seconds(work) / len(weights)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, ImportError, OSError, TritonError) as e:
        level = logging.DEBUG if isinstance(e, ValueError) else logging.INFO
        log.log(level, "a way of 4-bit products does not take %s: %s", form(weights[0]), e)
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
