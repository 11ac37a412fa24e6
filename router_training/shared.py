"""A new task's adapter from few rows, on top of adapters that are there already.

Adapters of one base have much in common: what in a prompt matters and what is decoration, where
the answer ends, how the base is told what to do. A new adapter that starts from what they share has
only to learn what is new in its task. The start is one adapter: the mean of the set's deltas, cut
to the new rank by a singular value decomposition, or the one of the set that fits the rows best.
What comes out is an adapter like any other: one PEFT directory, served without the set.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mora_serve.errors import InvalidArgument
from mora_serve.model.decoder import Decoder
from mora_serve.model.shape import PROJECTIONS
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, Log, MixedRow, row_losses, train_adapters
from router_training.batches import TokenRow, chunks

Start = Literal["random", "mean", "nearest"]


@dataclass(frozen=True)
class NewTaskRecipe:
    """How an adapter is trained on few rows.

    ``batch``: at most so many rows a step; each row comes once before any comes again.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    steps: int = 60
    batch: int = 16
    lr: float = 4e-3
    warmup: int = 10
    seed: int = 0


def train_new_task(
    decoder: Decoder,
    rows: Sequence[TokenRow],
    recipe: NewTaskRecipe,
    shared: StackedAdapters | None = None,
    start: Start = "mean",
    log: Log = print,
) -> StackedAdapters:
    """One adapter (count 1, for ``save_peft``) trained on ``rows``.

    ``shared`` is the set to build on (``load_peft``); it does not change. Without it, or with the
    start "random", A is random and B zero, as for any first adapter.

    Raises InvalidArgument where there are no rows, or where the set lacks a target.
    """
    if not rows:
        raise InvalidArgument("rows: none given; a new task takes at least one", field="rows")

    def prepare(adapter: StackedAdapters) -> None:
        if shared is not None and start == "nearest":
            copy_mean(shared, [nearest(decoder, shared, rows)], adapter)
        elif shared is not None and start == "mean":
            copy_mean(shared, range(shared.count), adapter)

    return train_adapters(
        decoder,
        1,
        _in_turn(rows, recipe.seed),
        AdapterRecipe(
            rank=recipe.rank,
            alpha=recipe.alpha,
            targets=recipe.targets,
            steps=recipe.steps,
            rows=min(recipe.batch, len(rows)),
            lr=recipe.lr,
            warmup=recipe.warmup,
            buckets=1,
            seed=recipe.seed,
        ),
        log,
        prepare,
    )


@torch.no_grad()
def nearest(decoder: Decoder, shared: StackedAdapters, rows: Sequence[TokenRow]) -> int:
    """The adapter of the set under which, at weight 1, the rows' mean loss is least."""

    def loss(index: int) -> float:
        mixed = [MixedRow(row, ((index, 1.0),)) for row in sorted(rows, key=len)]
        return sum(row_losses(decoder, shared, part).sum().item() for part in chunks(mixed))

    return min(range(shared.count), key=loss)


@torch.no_grad()
def copy_mean(shared: StackedAdapters, indices: Sequence[int], adapter: StackedAdapters) -> None:
    """Make the only adapter of ``adapter`` the mean of some adapters' deltas s B A.

    At each projection it is the best approximation of its rank (Eckart-Young). Ranks that the
    mean does not fill keep their A, and a B of zero, so that they can still learn.

    Raises InvalidArgument where the set lacks a target of ``adapter``.
    """
    missing = sorted(set(adapter.targets) - set(shared.targets))
    if missing:
        raise InvalidArgument(
            f"targets: the shared set lacks {', '.join(missing)}; choose among its own",
            field="targets",
        )
    factor = shared.alpha / shared.rank / len(indices) / (adapter.alpha / adapter.rank)
    for layer in range(adapter.shape.layers):
        for projection in adapter.targets:
            parts = [shared.projection(layer, projection, i) for i in indices]
            scales = [1.0 if shared.scales is None else shared.scales[i, layer] for i in indices]
            a, b = low_rank(
                torch.cat([a for a, _ in parts]),
                torch.cat([b * scale for (_, b), scale in zip(parts, scales, strict=True)]),
                adapter.rank,
            )
            own_a, own_b = adapter.projection(layer, projection, 0)
            own_a[: len(a)] = a
            own_b.zero_()[: len(b)] = b * factor


def low_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [r, out], r <= ``rank``, with B.T A nearest to b.T a; a [n, in], b [n, out].

    A and B share the singular values alike; r is less than ``rank`` where b.T a has no more.
    Nothing of the size in x out is decomposed: QR of both first.
    """
    q_in, r_in = torch.linalg.qr(a.T)
    q_out, r_out = torch.linalg.qr(b.T)
    u, values, v = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    kept = min(rank, int((values > 1e-6 * values[0]).sum()))
    root = values[:kept].sqrt()[:, None]
    return root * (v[:kept] @ q_in.T), root * (q_out @ u[:, :kept]).T


def _in_turn(rows: Sequence[TokenRow], seed: int) -> Callable[[], MixedRow]:
    """Rows in passes over all of them, each in an order of its own."""
    rng = random.Random(f"new task/{seed}")
    left: list[TokenRow] = []

    def draw() -> MixedRow:
        if not left:
            left.extend(rng.sample(rows, len(rows)))
        return MixedRow(left.pop(), ((0, 1.0),))

    return draw
