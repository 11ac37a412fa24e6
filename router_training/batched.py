"""Train many adapters in one pass: every row of a batch has its own mixture.

The decoder and the low-rank layer are the server's own, in its differentiable form; the base
stays as it is served (4-bit where it is).
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mora_serve.model.attention import DenseCausal, SomeQueries
from mora_serve.model.decoder import Decoder, Wanted
from mora_serve.model.shape import PROJECTIONS
from mora_serve.model.stacked import StackedAdapters
from router_training.batches import TokenBatch, TokenRow, bucketed, collate

Log = Callable[[str], None]

# A base of at most so many parameters is dequantised once instead of twice a chunk.
DENSE_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class AdapterRecipe:
    """AdamW with a warm-up and a cosine; ``clip`` bounds the norm over all adapters.

    ``buckets`` batches are drawn at a time and sorted by length. Take 1 where few rows are drawn
    again and again: sorted, copies of one row would fill a batch. ``layer_scales``: a factor for
    each adapter and layer is learned too.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    steps: int = 200
    rows: int = 96
    lr: float = 4e-3
    warmup: int = 30
    clip: float = 1.0
    buckets: int = 16
    layer_scales: bool = False
    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class MixedRow:
    """One row and its mixture: (adapter index, weight) pairs."""

    tokens: TokenRow
    mixture: tuple[tuple[int, float], ...]


def mixture_weights(rows: Sequence[MixedRow], count: int) -> Tensor:
    """The rows' mixtures as a matrix [rows, count]."""
    weights = torch.zeros(len(rows), count)
    for i, row in enumerate(rows):
        for adapter, weight in row.mixture:
            weights[i, adapter] += weight
    return weights


Losses = Callable[[Decoder, StackedAdapters, Sequence[MixedRow]], Tensor]


class Follower(Protocol):
    """Keeps a run's progress."""

    def begin(self, adapters: StackedAdapters, optimizer: Any, schedule: Any) -> int:
        """Put back what was saved, if anything was; how many steps are done."""

    def after(self, step: int, adapters: StackedAdapters, optimizer: Any, schedule: Any) -> bool:
        """Called after each step, counted from 1; whether the run ends with it."""


def row_losses(
    decoder: Decoder,
    adapters: StackedAdapters | None,
    rows: Sequence[MixedRow],
    weights: Tensor | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of each row's answer tokens [rows].

    ``weights`` [rows, count] stand for the rows' own mixtures where given; see
    ``StackedAdapters.mix`` for ``support``. Without adapters, the base's.
    """
    batch = collate([row.tokens for row in rows])
    wanted = batch.answer.flatten().nonzero().flatten()
    if weights is None and adapters is not None:
        weights = mixture_weights(rows, adapters.count)
    hidden = batch_hidden(decoder, batch, adapters, weights, wanted, support)
    losses = F.cross_entropy(
        decoder.logits(hidden), batch.targets.flatten()[wanted], reduction="none"
    )
    row = wanted // batch.inputs.shape[1]
    sums = torch.zeros(len(rows)).index_add(0, row, losses)
    return sums / batch.answer.sum(1)


def train_adapters(
    decoder: Decoder,
    count: int,
    draw: Callable[[], MixedRow],
    recipe: AdapterRecipe,
    log: Log = print,
    prepare: Callable[[StackedAdapters], None] | None = None,
    penalty: Callable[[StackedAdapters], Tensor] | None = None,
    *,
    start: StackedAdapters | None = None,
    losses: Losses = row_losses,
    besides: Sequence[dict[str, Any]] = (),
) -> StackedAdapters:
    """Train ``count`` adapters on rows from ``draw``, in batches of similar length.

    ``start``: adapters to go on with, instead of new ones of the recipe's size. ``prepare`` gets
    the adapters before the first step. See ``train_on`` for the others.
    """
    torch.manual_seed(recipe.seed)
    adapters = start or StackedAdapters(
        decoder.shape, count, recipe.rank, recipe.alpha, recipe.targets, recipe.layer_scales
    )
    if recipe.layer_scales and adapters.scales is None:
        adapters.scales = nn.Parameter(torch.ones(count, decoder.shape.layers))
    if prepare is not None:
        prepare(adapters.requires_grad_())
    rng = random.Random(recipe.seed)
    batches = bucketed(draw, lambda row: len(row.tokens), recipe.rows, rng, recipe.buckets)
    started, recent = time.monotonic(), 0.0

    def note(step: int, loss: float) -> None:
        nonlocal recent
        recent = loss if step == 1 else 0.9 * recent + 0.1 * loss
        if step % 25 == 0 or step == recipe.steps:
            seconds = time.monotonic() - started
            eta = seconds / step * (recipe.steps - step)
            log(f"adapters {step}/{recipe.steps} {seconds:.0f}s eta {eta:.0f}s loss {recent:.3f}")

    return train_on(
        decoder, adapters, batches, recipe, note, penalty=penalty, losses=losses, besides=besides
    )


def train_on(
    decoder: Decoder,
    adapters: StackedAdapters,
    batches: Iterator[Sequence[MixedRow]],
    recipe: AdapterRecipe,
    note: Callable[[int, float], None],
    *,
    penalty: Callable[[StackedAdapters], Tensor] | None = None,
    losses: Losses = row_losses,
    besides: Sequence[dict[str, Any]] = (),
    schedule: Callable[[int], float] | None = None,
    follower: Follower | None = None,
) -> StackedAdapters:
    """Train adapters on batches; the loss is the mean over a batch's rows of what ``losses`` gives,
    and ``penalty`` of the adapters, where given.

    ``besides`` are further groups of parameters for the optimiser, whose learning rates follow the
    same ``schedule``: the share of a step, counted from 0, else the recipe's cosine. ``note`` gets
    each step, counted from 1, and its loss. With a ``follower`` a run can go on where one was
    stopped: batches that it had are drawn and left. An adapter that no row uses stays as it is.
    """
    decoder = trained_through(decoder)
    adapters.requires_grad_()
    parameters = list(adapters.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": recipe.lr}, *besides],
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    shares = torch.optim.lr_scheduler.LambdaLR(
        optimizer, schedule or (lambda step: rate(step, recipe))
    )
    done = 0 if follower is None else follower.begin(adapters, optimizer, shares)
    for _ in range(done):
        next(batches)
    for step in range(done + 1, recipe.steps + 1):
        optimizer.zero_grad()
        loss, batch = 0.0, next(batches)
        # Side by side, rows of one adapter leave the others out of the product.
        for part in parts(sorted(batch, key=lambda row: row.mixture)):
            share = losses(decoder, adapters, part).sum() / len(batch)
            torch.autograd.backward(share)
            loss += share.item()
        if penalty is not None:
            torch.autograd.backward(penalty(adapters))
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        shares.step()
        note(step, loss)
        if follower is not None and follower.after(step, adapters, optimizer, shares):
            break
    return adapters.requires_grad_(False)


def parts(rows: Sequence[MixedRow], size: int = 32) -> list[Sequence[MixedRow]]:
    """Even parts of about ``size`` rows; a cut goes where the mixture changes, if that is near."""
    changes = [i for i in range(1, len(rows)) if rows[i].mixture != rows[i - 1].mixture]
    count = max(1, round(len(rows) / size))
    bounds = [0]
    for i in range(1, count):
        even = round(i * len(rows) / count)
        near = min(changes, key=lambda at: abs(at - even), default=even)
        bounds.append(near if abs(near - even) <= size // 4 else even)
    bounds.append(len(rows))
    return [rows[a:b] for a, b in itertools.pairwise(bounds)]


def trained_through(decoder: Decoder) -> Decoder:
    """The decoder as training runs it: dense where the base is small enough for that."""
    return decoder.dense() if decoder.shape.linear_parameters <= DENSE_PARAMETERS else decoder


def batch_hidden(
    decoder: Decoder,
    batch: TokenBatch,
    adapters: StackedAdapters | None = None,
    weights: Tensor | None = None,
    wanted: Tensor | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """Last hidden states [B * L, hidden] of a padded batch; weights and support [B, count].

    With ``wanted`` [n], ascending indices into B * L, those of these tokens alone: [n, hidden].
    """
    rows, length = batch.inputs.shape
    window = decoder.shape.sliding_window
    mixture = last = None
    if adapters is not None and weights is not None:
        mixture = adapters.mix(weights, length, support)
    if wanted is not None:
        some = None if mixture is None else mixture.at(wanted)
        last = Wanted(wanted, SomeQueries(wanted, rows, length, window), some)
    return decoder.hidden(
        batch.inputs.flatten(),
        torch.arange(length).repeat(rows),
        DenseCausal(rows, length, window),
        mixture,
        last,
    )


def rate(step: int, recipe: AdapterRecipe) -> float:
    """The learning rate of a step, counted from 0, as a share of the recipe's.

    A warm-up of 0 steps is none.
    """
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / max(1, recipe.warmup)) * max(0.02, cosine)


def subset(adapters: StackedAdapters, indices: Sequence[int]) -> StackedAdapters:
    """A stack of some of the adapters, copied, in the order given; for evaluation."""
    out = StackedAdapters(
        adapters.shape,
        len(indices),
        adapters.rank,
        adapters.alpha,
        adapters.targets,
        adapters.scales is not None,
    ).requires_grad_(False)
    for place, index in enumerate(indices):
        copy_into(adapters, index, out, place)
    return out


def copy_adapter(adapters: StackedAdapters, source: int, target: int) -> None:
    """Overwrite one adapter of a stack with another, also in the middle of training."""
    copy_into(adapters, source, adapters, target)


@torch.no_grad()
def copy_into(source: StackedAdapters, index: int, target: StackedAdapters, place: int) -> None:
    """Overwrite one adapter of a stack with one of another stack of the same shape."""
    for key in source.a:
        if key.endswith(f"/{index}"):
            other = f"{key.rpartition('/')[0]}/{place}"
            target.a[other].copy_(source.a[key])
            target.b[other].copy_(source.b[key])
    if source.scales is not None and target.scales is not None:
        target.scales[place] = source.scales[index]
