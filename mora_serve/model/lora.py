"""The mixed low-rank layer: every row of a batch with its own weighted adapters.

    y = W x + sum_i w_i * s_i * B_i (A_i x)        s_i = alpha/r, or alpha/sqrt(r) for rsLoRA

computed on activations, so it equals PEFT's ``cat`` combination and needs no merged artefact.
DoRA (arXiv 2402.09353) adds, with c = m / ||W + s B A|| per output row, the delta
(c - 1) * (W x) + c * s B (A x). c is near 1, so c - 1 is what is kept: bfloat16 would round it off.

``PooledAdapters`` is the form that reads the server's slots; the trainable form of the same layer
is in stacked.py. A projection's A is [rank, in] and its B is kept transposed, [rank, out], so that
both products read rows of one rank. Slots in the compute type are here, those in 8 bits in
int8_slots.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mora_serve.model.memory import Arena
from mora_serve.model.shape import SITES, ModelShape

# Writes an adapter's A [rank, in] and B [rank, out], the scaling in it, to two tensors.
ReadFactors = Callable[[Tensor, Tensor], None]


@dataclass(slots=True)
class ProjectionSlots:
    """One projection's adapters in all slots.

    ``a`` [slots, max_rank, in], ``b`` [slots, max_rank, out] with the scaling folded in,
    ``dora`` [slots, out] holds c - 1, and of an adapter without DoRA anything. ``start`` is where
    the projection's outputs begin in its site.
    """

    a: Tensor
    b: Tensor
    dora: Tensor
    start: int

    @property
    def width(self) -> int:
        """Output features."""
        return self.b.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What holds A and B, each [slots, max_rank, ...]: an adapter fills its first rows."""
        return self.a, self.b

    def encode(self, rows: Sequence[Tensor], read: ReadFactors) -> None:
        """Fill ``rows``, on the host, with what ``tensors`` are to hold of an adapter: [rank, ...].

        ``read`` takes tensors of float32 or the compute type, and rounds to that once.
        """
        read(*rows)

    def factors(self, slots: int | slice, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [..., rank, in] and B [..., rank, out] of slots for products in ``dtype``."""
        return self.a[slots, :rank].to(dtype), self.b[slots, :rank].to(dtype)


class AdapterSlots:
    """The device memory of a fixed number of adapters, per layer and projection.

    A slot that an adapter does not fill (a lower rank, a missing projection) holds zeros.
    ``dtype`` is the compute type, in which this class keeps them; others may keep less. DoRA's
    scales have their memory from the start, a few percent of all: what reads the slots, a CUDA
    graph above all, is never made anew for an adapter.
    """

    def __init__(
        self,
        shape: ModelShape,
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.max_rank, self.dtype, self.device = slots, max_rank, dtype, device
        self.ranks = [0] * slots
        self.has_dora = [False] * slots
        self.layers: list[dict[str, tuple[ProjectionSlots, ...]]] = []
        arena, scales = Arena(), Arena()  # apart: without DoRA nothing is ever written to these
        for _ in range(shape.layers):
            sites = {}
            for site, projections in SITES.items():
                parts, start = [], 0
                for projection in projections:
                    rows, columns = shape.projection(projection)
                    dora = scales.zeros((slots, rows), dtype, device)
                    parts.append(self._part(arena, columns, dora, start))
                    start += rows
                sites[site] = tuple(parts)
            self.layers.append(sites)

    def _part(self, arena: Arena, columns: int, dora: Tensor, start: int) -> ProjectionSlots:
        """A projection's slots: ``columns`` inputs, as many outputs as ``dora`` has."""
        sizes = [(self.slots, self.max_rank, n) for n in (columns, dora.shape[1])]
        a, b = (arena.zeros(size, self.dtype, self.device) for size in sizes)
        return ProjectionSlots(a, b, dora, start)

    @property
    def stored(self) -> torch.dtype:
        """The type in which A and B are kept."""
        return next(iter(self.parts())).a.dtype

    def projection(self, layer: int, projection: str) -> ProjectionSlots:
        """The slots of one projection of one layer."""
        for site, names in SITES.items():
            if projection in names:
                return self.layers[layer][site][names.index(projection)]
        raise KeyError(projection)

    def parts(self) -> Iterable[ProjectionSlots]:
        """Every projection of every layer."""
        for sites in self.layers:
            for parts in sites.values():
                yield from parts

    @property
    def nbytes(self) -> int:
        """Device memory of all slots, DoRA's scales apart."""
        return sum(t.nbytes for part in self.parts() for t in part.tensors)


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows of a batch that use one slot, and each row's weight."""

    slot: int
    rows: Tensor  # [n] int64
    weights: Tensor  # [n, 1]
    whole: bool  # the segment covers every row of the batch, in order


@dataclass(slots=True)
class Plan:
    """Which rows use which slots in one step; the same for all layers."""

    segments: tuple[Segment, ...]
    rank: int = 0
    # The batched form for many short segments: slots low..high, `width` rows each, padded.
    low: int = 0
    high: int = 0
    padded: Tensor | None = None  # [high - low, width] rows, padding points at row 0
    valid: Tensor | None = None  # indices into the flattened [high - low, width]
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    weights: Tensor = field(default_factory=lambda: torch.empty(0, 1))


def plan_mixtures(
    slots: AdapterSlots, mixtures: Sequence[tuple[tuple[int, float], ...]], lengths: Sequence[int]
) -> Plan | None:
    """Lay out a step: chunk i has ``lengths[i]`` rows and the (slot, weight) pairs ``mixtures[i]``.

    Returns None when no row uses an adapter: then the base's products are all there is.
    """
    by_slot: dict[int, list[tuple[int, int, float]]] = {}
    start = 0
    for mixture, length in zip(mixtures, lengths, strict=True):
        for slot, weight in mixture:
            by_slot.setdefault(slot, []).append((start, length, weight))
        start += length
    if not by_slot:
        return None
    dtype, device = slots.dtype, slots.device
    segments, flat_rows, flat_weights = [], [], []
    order = sorted(by_slot)
    for slot in order:
        rows = [r for s, n, _ in by_slot[slot] for r in range(s, s + n)]
        weights = [w for _, n, w in by_slot[slot] for _ in range(n)]
        flat_rows.append(rows)
        flat_weights.append(weights)
        segments.append(
            Segment(
                slot,
                torch.tensor(rows, device=device),
                torch.tensor(weights, dtype=dtype, device=device)[:, None],
                rows == list(range(start)),
            )
        )
    plan = Plan(tuple(segments), max(slots.ranks[s] for s in order))
    low, high, width = order[0], order[-1] + 1, max(map(len, flat_rows))
    useful = sum(map(len, flat_rows))
    dense = (high - low) * width <= 2 * useful and len(order) > 2
    if dense and not any(slots.has_dora[s] for s in order):
        padded, valid = [[0] * width for _ in range(high - low)], []
        for slot, rows in zip(order, flat_rows, strict=True):
            padded[slot - low][: len(rows)] = rows
            valid += [(slot - low) * width + j for j in range(len(rows))]
        plan.low, plan.high = low, high
        plan.padded = torch.tensor(padded, device=device)
        plan.valid = torch.tensor(valid, device=device)
        plan.rows = torch.tensor([r for rows in flat_rows for r in rows], device=device)
        plan.weights = torch.tensor(
            [w for ws in flat_weights for w in ws], dtype=dtype, device=device
        )[:, None]
    return plan


class PooledAdapters:
    """The adapters of one step, read from the slots. Rows without adapters are not touched."""

    def __init__(self, slots: AdapterSlots, plan: Plan) -> None:
        self.slots, self.plan = slots, plan

    def apply(self, layer: int, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Add the mixture's delta to y in place; see decoder.Adapters."""
        parts = self.slots.layers[layer][site]
        if self.plan.padded is None:
            self._by_segment(parts, x, y)
        else:
            self._batched(parts, x, y, self.plan.padded)
        return y

    def _batched(
        self, parts: Sequence[ProjectionSlots], x: Tensor, y: Tensor, padded: Tensor
    ) -> None:
        plan = self.plan
        gathered = x[padded]  # [slots, width, in]
        live = slice(plan.low, plan.high)
        for part in parts:
            a, b = part.factors(live, plan.rank, x.dtype)
            delta = torch.bmm(torch.bmm(gathered, a.transpose(1, 2)), b).flatten(0, 1)
            y[:, part.start : part.start + part.width].index_add_(
                0, plan.rows, delta[plan.valid] * plan.weights
            )

    def _by_segment(self, parts: Sequence[ProjectionSlots], x: Tensor, y: Tensor) -> None:
        # DoRA rescales Wx itself, not what other adapters of the row added to it.
        dora = any(self.slots.has_dora[s.slot] for s in self.plan.segments)
        base = y.clone() if dora else y
        for segment in self.plan.segments:
            rank = self.slots.ranks[segment.slot]
            inputs = x if segment.whole else x[segment.rows]
            for part in parts:
                out = slice(part.start, part.start + part.width)
                a, b = part.factors(segment.slot, rank, x.dtype)
                delta = (inputs @ a.T * segment.weights) @ b
                if self.slots.has_dora[segment.slot]:
                    scaled = delta + segment.weights * base[segment.rows, out]
                    delta = delta + part.dora[segment.slot] * scaled
                if segment.whole:
                    y[:, out] += delta
                else:
                    y[:, out].index_add_(0, segment.rows, delta)


def dora_norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """||W + BA|| per output row, by which DoRA's c is m / ||W + BA||, in float32: [out].

    weight [out, in] dequantised; a [rank, in]; b [rank, out] with the scaling folded in.
    """
    merged = torch.addmm(weight.float(), b.float().T, a.float())
    norm: Tensor = torch.linalg.vector_norm(merged, dim=1)
    return norm
