"""What a card would hold: base, adapter slots, and what that leaves for keys and values.

Calculated from the shape, not measured; the formulas of what is allocated once are exact
(model/footprint.py), those of what a step needs meanwhile are of its largest tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mora_serve.config import DEFAULT_SLOTS, AdaptersConfig, EngineConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model import footprint
from mora_serve.model.shape import SITES, ModelShape


@dataclass(frozen=True)
class Wanted:
    """What the card is to do: defaults are the server's. ``context`` 0: the base's own limit."""

    card: int
    quantization: str = "nf4"
    itemsize: int = 2
    slots: int = DEFAULT_SLOTS
    rank: int = 16
    dora: bool = False
    adapter_dtype: Literal["auto", "int8"] = "auto"
    context: int = 8192
    requests: int = 1
    max_batch: int = EngineConfig.max_batch
    step_tokens: int = EngineConfig.step_tokens
    page_size: int = EngineConfig.page_size
    cuda: bool = True


@dataclass(frozen=True)
class ServingPlan:
    """Bytes by part, and what is left. ``kv_bytes`` may be below zero: then nothing fits.

    ``pages`` of ``page_size`` tokens hold ``tokens`` in all; ``concurrent`` requests of
    ``context`` tokens each run at the same time.
    """

    parts: Mapping[str, int]
    card: int
    kv_bytes: int
    page_bytes: int
    pages: int
    tokens: int
    context: int
    concurrent: int
    requests: int

    @property
    def fits(self) -> bool:
        """Whether the wanted requests run at the same time."""
        return self.concurrent >= self.requests


def plan(shape: ModelShape, wanted: Wanted) -> ServingPlan:
    """The parts of a card's memory. Raises InvalidArgument for what no server could be told."""
    _check(wanted)
    w, item = wanted, wanted.itemsize
    context = min(w.context or shape.max_positions, shape.max_positions)
    parts = {
        "linear weights": footprint.linear_bytes(shape, w.quantization, item),
        "embedding and head": shape.table_parameters * item,
        "norms, biases, rope tables": footprint.small_bytes(shape, item),
        "adapter slots": w.slots * footprint.slot_bytes(shape, w.rank, item, w.adapter_dtype),
    }
    if w.dora or w.cuda:  # on a card they are taken at start
        parts["DoRA scales of the slots"] = w.slots * footprint.dora_bytes(shape, item)
    if w.quantization != "none":
        parts["one dequantised site"] = max(_site(shape, s) for s in SITES) * item
    parts["a step's activations"] = w.step_tokens * _widest(shape) * item
    parts["logits, float32, twice"] = 2 * w.max_batch * shape.vocab_size * 4
    if w.cuda:
        parts["CUDA itself, about"] = footprint.CUDA_BYTES
    left = w.card - sum(parts.values())
    page = footprint.kv_token_bytes(shape, item) * w.page_size
    pages_each = -(-context // w.page_size)
    # Where torch computes, the keys and values of a layer are gathered, the keys in float32 too.
    gathered = shape.kv_heads * shape.head_dim * (2 * item + 4) * w.page_size
    concurrent = max(0, left - page) // (pages_each * (page + gathered))
    concurrent = min(concurrent, w.max_batch)
    parts["one layer's keys and values, gathered"] = concurrent * pages_each * gathered
    kv = w.card - sum(parts.values())
    # Page 0 pads page tables; a server makes no more pages than its requests can fill.
    pages = max(0, min(kv // page - 1, w.max_batch * pages_each))
    return ServingPlan(
        parts, w.card, kv, page, pages, pages * w.page_size, context, concurrent, w.requests
    )


def fewest_changes(shape: ModelShape, wanted: Wanted) -> tuple[str, Wanted] | None:
    """The first change that makes it fit: fewer slots, half the context, or fewer requests."""
    for name in ("slots", "context", "requests"):
        changed = wanted
        least = AdaptersConfig.max_mixture if name == "slots" else 256 if name == "context" else 1
        while getattr(changed, name) // 2 >= least:
            changed = dataclasses.replace(changed, **{name: getattr(changed, name) // 2})
            if plan(shape, changed).fits:
                return f"{name} {getattr(changed, name)}", changed
    return None


def _site(shape: ModelShape, site: str) -> int:
    sizes = [shape.projection(p) for p in SITES[site]]
    return sum(rows for rows, _ in sizes) * sizes[0][1]


def _widest(shape: ModelShape) -> int:
    """Numbers a token at a layer's widest moment: the residual twice, gate, up, their product."""
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return 2 * shape.hidden_size + max(3 * shape.intermediate_size, 2 * attention)


def _check(wanted: Wanted) -> None:
    for field in dataclasses.fields(wanted):
        value, least = getattr(wanted, field.name), 0 if field.name == "context" else 1
        if type(value) is int and not least <= value < 1 << 60:
            raise InvalidArgument(
                f"{field.name}: {value} is out of range; it must be at least {least}",
                field=field.name,
            )
