"""How a base is cut over the ranks of tensor parallelism, one rank a device.

After Megatron-LM (arXiv 1909.08053): q/k/v by heads and gate/up by intermediate features, so that a
rank computes whole heads and features; o and down by their inputs, so that each rank has a part of
their sums, which one all-reduce a site adds up. The residual stream is the same on every rank.

An adapter is cut as its projection is. A of o and down is cut by columns, so that B (A x) is a sum
over the ranks as W x is, and joins the same all-reduce. DoRA multiplies whole output rows, which
commutes with that sum; only the rows' norms span the ranks (see HostAdapters).

NF4 has one scale for 64 columns of a row. Every cut is between two such blocks, so that a shard's
numbers are those of the whole weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from mora_serve.errors import ConfigError
from mora_serve.model.footprint import BLOCK, can_quantise
from mora_serve.model.quant import DenseWeight, NF4Weight, Stackable, Weight
from mora_serve.model.shape import SITES, ModelShape

SUMMED = ("o", "down")  # sites whose outputs are sums over the ranks
_HEADS = ("q_proj", "k_proj", "v_proj")


class Group(Protocol):
    """The ranks that share a base, as one of them sees them.

    Every rank makes the same calls in the same order, and gets the same numbers of each.
    """

    @property
    def rank(self) -> int:
        """This one's place, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        ...

    def sum(self, x: Tensor) -> Tensor:
        """The ranks' tensors of one shape, added up; may write into x."""
        ...

    def join(self, x: Tensor, width: int) -> Tensor:
        """The ranks' [n, part of width], side by side in ``spans(width, size)``: [n, width]."""
        ...

    def all_can(self, able: bool) -> bool:
        """Whether every rank is ``able``; their counts of calls are the same afterwards."""
        ...

    def launched(self) -> None:
        """A graph was launched that has sums and joins."""
        ...


def spans(total: int, ranks: int, unit: int = 1) -> list[slice]:
    """0..total in so many parts, each of whole units, the first ones larger by a unit at most."""
    units = total // unit
    ends = [0]
    for rank in range(ranks):
        ends.append(ends[-1] + unit * (units // ranks + (rank < units % ranks)))
    return [slice(a, b) for a, b in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a base of ``shape`` that one rank holds."""

    shape: ModelShape
    rank: int
    ranks: int

    @classmethod
    def of(cls, shape: ModelShape, rank: int, ranks: int, *, quantised: bool) -> Shard:
        """Raises ConfigError where the base cannot be cut into so many parts."""
        shard = cls(shape, rank, ranks)
        if shape.kv_heads % ranks or shape.heads % ranks:
            fitting = [n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0]
            numbers = ", ".join(map(str, fitting))
            raise ConfigError(
                f"engine.tensor_parallel: {ranks} ranks cannot share {shape.kv_heads} key/value "
                f"heads evenly; this base takes {numbers}",
                field="engine.tensor_parallel",
            )
        if shape.intermediate_size // _unit(shape) < ranks:
            raise ConfigError(
                f"engine.tensor_parallel: {ranks} ranks cannot share {shape.intermediate_size} "
                f"intermediate features in parts of {_unit(shape)}; lower it",
                field="engine.tensor_parallel",
            )
        columns = shape.heads * shape.head_dim
        if quantised and can_quantise(shape.hidden_size, columns) and columns // ranks % BLOCK:
            raise ConfigError(
                f"engine.tensor_parallel: {ranks} ranks would cut o_proj's rows of {columns} "
                f"inside of NF4's blocks of {BLOCK}; lower it, or set base.quantization to 'none'",
                field="engine.tensor_parallel",
            )
        return shard

    @property
    def local(self) -> ModelShape:
        """The shape of this rank's part: fewer heads, a part of the intermediate features."""
        features = self._features
        return replace(
            self.shape,
            heads=self.shape.heads // self.ranks,
            kv_heads=self.shape.kv_heads // self.ranks,
            intermediate_size=features.stop - features.start,
        )

    @property
    def vocabulary(self) -> slice:
        """The head's rows."""
        return spans(self.shape.vocab_size, self.ranks)[self.rank]

    def part(self, projection: str) -> tuple[slice, slice]:
        """Which rows and columns of a projection's weight. KeyError for an unknown name."""
        rows, columns = (slice(0, n) for n in self.shape.projection(projection))
        if projection in _HEADS:
            rows = spans(rows.stop, self.ranks)[self.rank]
        elif projection in ("gate_proj", "up_proj"):
            rows = self._features
        elif projection == "o_proj":
            columns = spans(columns.stop, self.ranks)[self.rank]
        else:
            columns = self._features
        return rows, columns

    @property
    def _features(self) -> slice:
        return spans(self.shape.intermediate_size, self.ranks, _unit(self.shape))[self.rank]


def is_summed(projection: str) -> bool:
    """Whether a projection's outputs are sums over the ranks."""
    return any(projection in SITES[site] for site in SUMMED)


def cut(weight: Weight, part: tuple[slice, slice]) -> Stackable:
    """Rows and columns of a weight, in memory of their own.

    Raises ConfigError for columns that are not whole blocks, and for a weight of another kind.
    """
    rows, columns = part
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.weight[rows, columns].clone())
    if isinstance(weight, NF4Weight):
        block = weight.shape[1] // weight.absmax.shape[1]
        if columns.start % block or columns.stop % block:
            raise ConfigError(
                f"engine.tensor_parallel: it would cut the base's weights inside of their blocks "
                f"of {block} columns; lower it, or serve a 16-bit checkpoint of this base",
                field="engine.tensor_parallel",
            )
        return NF4Weight(
            weight.codes[rows, columns.start // 2 : columns.stop // 2].clone(),
            weight.absmax[rows, columns.start // block : columns.stop // block].clone(),
        )
    raise ConfigError(
        "engine.tensor_parallel: weights of this base's format cannot be cut; set it to 1, or "
        "serve a 16-bit or NF4 checkpoint of this base",
        field="engine.tensor_parallel",
    )


def _unit(shape: ModelShape) -> int:
    """What the intermediate features are cut in: NF4's blocks, where these fit."""
    return BLOCK if shape.intermediate_size % BLOCK == 0 else 1
