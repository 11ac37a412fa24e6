"""A new task's adapter from few rows, on top of adapters that are there already.

Adapters of one base have much in common: what in a prompt matters and what is decoration, where
the answer ends, often half of the task itself. Which of it helps a new task cannot be told before
training: the adapter under which its rows lose least is often a poor start. So all starts are
tried, the set's adapters, their mean and chance, in one run of the batched trainer on a part of the
rows; the other part decides. What comes out is an adapter like any other: one PEFT directory,
served without the set.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mora_serve.errors import InvalidArgument
from mora_serve.model.decoder import Decoder
from mora_serve.model.shape import PROJECTIONS
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import (
    AdapterRecipe,
    Log,
    MixedRow,
    row_losses,
    subset,
    train_adapters,
)
from router_training.batches import TokenRow, chunks
from router_training.starts import Start, begin

LEAST_ROWS = 4  # fewer cannot be parted into rows to train on and rows to judge by


@dataclass(frozen=True)
class TrialRecipe:
    """How starts are compared.

    ``rounds``: (steps, how many starts go on) each, as in successive halving; a step has ``batch``
    rows of every start. A share ``held_out`` of the rows decides. Of a large set, the ``most``
    adapters are tried under which the untrained rows lose least.
    """

    rounds: tuple[tuple[int, int], ...] = ((15, 5), (30, 1))
    batch: int = 12
    held_out: float = 0.25
    most: int = 32


@dataclass(frozen=True)
class NewTaskRecipe:
    """How an adapter is trained on few rows.

    ``batch``: at most so many rows a step; each row comes once before any comes again.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    steps: int = 120
    batch: int = 16
    lr: float = 4e-3
    warmup: int = 10
    seed: int = 0
    trial: TrialRecipe = field(default_factory=TrialRecipe)

    def adapters(self, steps: int, rows: int, warmup: int, count: int = 1) -> AdapterRecipe:
        """The trainer's recipe for ``count`` adapters at once; ``rows`` a step for each."""
        return AdapterRecipe(
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            steps=steps,
            rows=rows * count,
            lr=self.lr,
            warmup=warmup,
            clip=math.sqrt(count),  # it bounds the norm over all of them
            buckets=1,
            seed=self.seed,
        )


def train_new_task(
    decoder: Decoder,
    rows: Sequence[TokenRow],
    recipe: NewTaskRecipe,
    shared: StackedAdapters | None = None,
    start: Start | None = None,
    log: Log = print,
) -> StackedAdapters:
    """One adapter (count 1, for ``save_peft``) trained on ``rows``.

    ``shared`` is the set to build on (``load_peft``); it does not change. ``start``: what to take
    from it; left out, ``best_start`` finds it. Without a set, A is random and B zero, as for any
    first adapter.

    Raises InvalidArgument where there are no rows, or where the set lacks a target.
    """
    if not rows:
        raise InvalidArgument("rows: none given; a new task takes at least one", field="rows")
    if shared is not None and start is None:
        start = best_start(decoder, rows, shared, recipe, log)

    def prepare(adapter: StackedAdapters) -> None:
        if shared is not None and start is not None:
            begin(adapter, 0, shared, start)

    settings = recipe.adapters(recipe.steps, min(recipe.batch, len(rows)), recipe.warmup)
    return train_adapters(decoder, 1, _in_turn(rows, 1, recipe.seed), settings, log, prepare)


def best_start(
    decoder: Decoder,
    rows: Sequence[TokenRow],
    shared: StackedAdapters,
    recipe: NewTaskRecipe,
    log: Log = print,
) -> Start:
    """The start that a little training gets furthest from, judged by rows it does not see.

    All are trained in one pass; of fewer than four rows, it is the mean without a trial.
    Raises InvalidArgument where the set lacks a target of the recipe.
    """
    if len(rows) < LEAST_ROWS:
        return "mean"
    trial = recipe.trial
    mixed = random.Random(f"trial/{recipe.seed}").sample(rows, len(rows))
    held = max(1, round(len(rows) * trial.held_out))
    judges, learnt = mixed[:held], mixed[held:]
    starts: list[Start] = ["random", "mean", *_promising(decoder, shared, learnt, trial.most)]
    adapters: StackedAdapters | None = None

    def prepare(stack: StackedAdapters) -> None:
        for place, start in enumerate(starts):
            begin(stack, place, shared, start)

    for steps, kept in trial.rounds:
        count = len(starts)
        adapters = train_adapters(
            decoder,
            count,
            _in_turn(learnt, count, recipe.seed),
            recipe.adapters(steps, trial.batch, recipe.warmup // 2, count),
            log,
            prepare if adapters is None else None,
            start=adapters,
        )
        losses = [_loss(decoder, adapters, place, judges) for place in range(count)]
        best = sorted(range(count), key=losses.__getitem__)[:kept]
        log("starts: " + ", ".join(f"{starts[i]} {losses[i]:.2f}" for i in best))
        adapters, starts = subset(adapters, best), [starts[i] for i in best]
    return starts[0]


def _promising(
    decoder: Decoder, shared: StackedAdapters, rows: Sequence[TokenRow], most: int
) -> list[int]:
    if shared.count <= most:
        return list(range(shared.count))
    losses = [_loss(decoder, shared, i, rows) for i in range(shared.count)]
    return sorted(range(shared.count), key=losses.__getitem__)[:most]


@torch.no_grad()
def _loss(
    decoder: Decoder, adapters: StackedAdapters, index: int, rows: Sequence[TokenRow]
) -> float:
    """The rows' summed loss under one adapter at weight 1."""
    mixed = [MixedRow(row, ((index, 1.0),)) for row in sorted(rows, key=len)]
    return sum(row_losses(decoder, adapters, part).sum().item() for part in chunks(mixed))


def _in_turn(rows: Sequence[TokenRow], count: int, seed: int) -> Callable[[], MixedRow]:
    """A row for each of ``count`` adapters in turn; each gets all rows before any comes again."""
    rng = random.Random(f"new task/{seed}")
    left: list[list[TokenRow]] = [[] for _ in range(count)]
    turns = itertools.cycle(range(count))

    def draw() -> MixedRow:
        index = next(turns)
        if not left[index]:
            left[index].extend(rng.sample(rows, len(rows)))
        return MixedRow(left[index].pop(), ((index, 1.0),))

    return draw
