"""Tasks found in rows without labels: a pool of adapters and the gate between them, together.

Expectation-maximisation over which adapter a row is for, in one run of the batched trainer:

1. k-means of the prompts makes more clusters than there are to be adapters, as small ones are
   purer; each trains an adapter of its own for a while;
2. rows go over to whichever of these adapters serves them, and adapters that serve each other's
   rows are joined, down to a few more than the pool's size: what a cluster is about shows in what
   its adapter can answer more than in its words;
3. in rounds, every row's loss is measured under every adapter, p_i ∝ exp(ΔNLL_i / T) times what
   a gate fitted on the other rows' prompts says, under a load-balance term, and the adapters
   train on rows drawn by p. T falls. Adapters that have become one, or that have hardly a row,
   give way to a half of the cluster that is served worst.

The gate and the likelihood are two views of a row: where one errs, the other outvotes it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mora_serve.errors import InvalidArgument
from mora_serve.model.decoder import Decoder
from mora_serve.model.stacked import StackedAdapters
from mora_serve.router.features import NGrams
from router_training.batched import (
    AdapterRecipe,
    Log,
    MixedRow,
    copy_adapter,
    subset,
    train_adapters,
    trained_through,
)
from router_training.batches import BUCKETS, distinct_buckets
from router_training.clusters import (
    Array,
    Ints,
    TextGate,
    agreed,
    distinct,
    kmeans,
    merge_cheapest,
)
from router_training.discovered import Discovered, UnlabelledRow, measure_losses

ROWS_EACH = 10  # rows of training an adapter, at least
FEW = 8  # rows that are not worth splitting
IDLE = 0.2  # of the fair share of rows: an adapter with fewer is idle


@dataclass(frozen=True)
class DiscoverRecipe:
    """How tasks are found.

    A round is 16 steps of ``adapters``. The first ``start_rounds`` train ``start_factor`` times
    as many clusters as the pool is to have adapters, the later ones ``spare`` times as many
    adapters, so that a task has one although another task holds two; what is left over is joined
    at the end. ``settled`` is the share of all rounds after
    which none is restarted. A round measures ``sample`` rows at most under every adapter.
    ``temperature`` falls from the first to the second, in nats of a token. Two adapters are one
    where each serves the other's rows and loses by it, in nats of a token, less than ``same`` of
    what a row loses under an adapter that is not its own.
    """

    adapters: AdapterRecipe = field(default_factory=lambda: AdapterRecipe(steps=192))
    features: NGrams = field(default_factory=NGrams)
    start_factor: float = 2.0
    start_rounds: int = 3
    spare: float = 1.3
    settled: float = 0.6
    sample: int = 480
    temperature: tuple[float, float] = (0.5, 0.1)
    balance: float = 1e-2
    same: float = 0.02


def discover(
    decoder: Decoder,
    rows: Sequence[UnlabelledRow],
    pool_size: int,
    recipe: DiscoverRecipe | None = None,
    log: Log = print,
) -> Discovered:
    """Train a pool of adapters on rows whose tasks nobody has named.

    Raises InvalidArgument for a pool of fewer than two, for fewer than ten rows an adapter, or
    for a recipe without a round after the first clusters'.
    """
    chosen = recipe or DiscoverRecipe()
    check_discoverable(len(rows), pool_size, chosen)
    search = _Search(trained_through(decoder), rows, pool_size, chosen, log)
    own = chosen.adapters
    distinct = min(len({row.tokens for row in rows}), chosen.sample)
    own = replace(own, buckets=distinct_buckets(distinct, own.rows, own.buckets))
    train_adapters(search.decoder, search.slots, search.draw, own, log, prepare=search.prepare)
    return search.result()


def centred(features: npt.ArrayLike) -> Array:
    """Features [n, d] without their mean, each of length 1."""
    given = np.asarray(features, np.float64)
    above = given - given.mean(0)
    out: Array = above / np.maximum(np.linalg.norm(above, axis=1, keepdims=True), 1e-9)
    return out


def check_discoverable(rows: int, pool_size: int, recipe: DiscoverRecipe) -> None:
    """Raise what ``discover`` raises for so many rows."""
    if pool_size < 2:
        raise InvalidArgument(
            f"pool_size: {pool_size} adapters are too few to tell tasks apart; give 2 or more",
            field="pool_size",
        )
    few = ROWS_EACH * pool_size
    if rows < few:
        raise InvalidArgument(
            f"rows: {rows} are too few for {pool_size} adapters; give {few} or more",
            field="rows",
        )
    least = (recipe.start_rounds + 1) * BUCKETS
    if recipe.adapters.steps <= least:
        raise InvalidArgument(
            f"adapters.steps: {recipe.adapters.steps} end before the first reassignment; give "
            f"more than {least}",
            field="adapters.steps",
        )


class _Search:
    """The state between rounds: which slots are alive, and which rows are whose."""

    def __init__(
        self,
        decoder: Decoder,
        rows: Sequence[UnlabelledRow],
        pool_size: int,
        recipe: DiscoverRecipe,
        log: Log,
    ) -> None:
        self.decoder, self.rows, self.recipe, self.log = decoder, rows, recipe, log
        self.pool_size, self.working = pool_size, round(recipe.spare * pool_size)
        self.rng = np.random.default_rng(recipe.adapters.seed)
        self.random = random.Random(recipe.adapters.seed)
        self.features = recipe.features.dense([row.text for row in rows]).astype(np.float64)
        points = centred(self.features)
        self.start = kmeans(points, round(recipe.start_factor * pool_size), self.rng)
        self.slots = max(int(self.start.max()) + 1, self.working)
        self.live = list(range(self.slots))
        self.sample = np.arange(len(rows))
        self.chances = np.eye(self.slots)[self.start]
        self.drawn = 0
        self.rounds = -(-recipe.adapters.steps // BUCKETS)

    def prepare(self, adapters: StackedAdapters) -> None:
        """Keep the adapters in training."""
        self.adapters = adapters

    def draw(self) -> MixedRow:
        """A row and one adapter, drawn by its probability."""
        size = self.recipe.adapters.rows * BUCKETS
        number, left = divmod(self.drawn, size)
        if not left and self.recipe.start_rounds <= number:
            self.reassign(number)
        self.drawn += 1
        at = self.random.randrange(len(self.sample))
        slot = self.random.choices(self.live, self.chances[at])[0]
        return MixedRow(self.rows[self.sample[at]].tokens, ((slot, 1.0),))

    def reassign(self, number: int) -> None:
        """Before round ``number``: measure, and change who is for what."""
        size = min(self.recipe.sample, len(self.rows))
        self.sample = np.sort(self.rng.choice(len(self.rows), size, replace=False))
        losses = self.measure(self.sample)
        features = self.features[self.sample]
        self.chances, _ = self.posterior(losses, features, number)
        if len(self.live) > self.working:
            kept = merge_cheapest(losses, self.chances.argmax(1), self.working)
            losses = self.keep(kept, losses)
            self.chances, _ = self.posterior(losses, features, number)
        if number < self.recipe.settled * self.rounds:
            self.restart(losses, number)
        loads = np.sort(self.chances.mean(0))
        self.log(
            f"round {number}/{self.rounds}: {len(self.live)} adapters, "
            f"loads {loads[0]:.3f} to {loads[-1]:.3f}"
        )

    def measure(self, indices: Ints) -> Array:
        """Losses [rows, live]."""
        return measure_losses(
            self.decoder, self.adapters, [self.rows[i].tokens for i in indices], self.live
        )

    def keep(self, columns: Sequence[int], losses: Array) -> Array:
        """Only these live adapters go on; their losses."""
        self.live = [self.live[c] for c in columns]
        return losses[:, columns]

    def posterior(self, losses: Array, features: Array, number: int) -> tuple[Array, TextGate]:
        """Probabilities [rows, live] by likelihood and by the gate, and the gate."""
        first, last = self.recipe.temperature
        done = (number - self.recipe.start_rounds) / max(self.rounds - self.recipe.start_rounds, 1)
        temperature = first * (last / first) ** min(done, 1.0)
        return agreed(-losses / temperature, features, self.recipe.balance / temperature)

    def restart(self, losses: Array, number: int) -> None:
        """Give adapters that are idle or double to halves of the clusters that are served worst."""
        labels = self.chances.argmax(1)
        kept = self.needed(losses, labels)
        if len(kept) < len(self.live):
            self.log(f"{len(self.live) - len(kept)} adapters are idle or double")
            losses = self.keep(kept, losses)
            self.chances, _ = self.posterior(losses, self.features[self.sample], number)
            labels = self.chances.argmax(1)
        for c in self.worst_served(losses, labels)[: self.working - len(self.live)]:
            own = np.flatnonzero(labels == c)
            sides = kmeans(np.minimum(losses[own], np.quantile(losses, 0.95)), 2, self.rng)
            slot = next(s for s in range(self.slots) if s not in self.live)
            copy_adapter(self.adapters, self.live[c], slot)
            self.live.append(slot)
            self.chances = np.pad(self.chances, ((0, 0), (0, 1)))
            self.chances[own[sides == 1]] = np.eye(len(self.live))[-1]

    def needed(self, losses: Array, labels: Ints) -> list[int]:
        """Adapters that are no other's double and have more than a few rows."""
        idle = IDLE * len(labels) / self.working
        return distinct(losses, labels, self.recipe.same, idle)

    def worst_served(self, losses: Array, labels: Ints) -> list[int]:
        """Clusters of more than a few rows, those with the largest loss of all rows first."""
        counts = np.bincount(labels, minlength=losses.shape[1])
        sums = np.bincount(labels, losses[np.arange(len(labels)), labels], losses.shape[1])
        return [int(c) for c in np.argsort(-sums) if counts[c] >= FEW]

    def result(self) -> Discovered:
        """What was found, without what is left over, and the gate on all rows."""
        everything = np.arange(len(self.rows))
        losses = self.measure(everything)
        chances, gate = self.posterior(losses, self.features, self.rounds)
        kept = self.needed(losses, chances.argmax(1))
        if len(kept) < len(self.live):
            losses = self.keep(kept, losses)
            chances, gate = self.posterior(losses, self.features, self.rounds)
        if len(self.live) > self.pool_size:
            kept = merge_cheapest(losses, chances.argmax(1), self.pool_size)
            losses = self.keep(kept, losses)
            chances, gate = self.posterior(losses, self.features, self.rounds)
        return Discovered(
            adapters=subset(self.adapters, self.live),
            assignment=chances.argmax(1),
            probabilities=chances,
            losses=losses,
            gate=gate,
            features=self.recipe.features,
            start=self.start,
        )
