"""The demo's adapters: one a task, all trained in one batched pass, alone and in pairs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mora_serve.model.decoder import Decoder
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, Log, MixedRow, train_adapters
from router_training.demo.base import tokens
from router_training.demo.coded import Row, earlier_turns
from router_training.demo.pairs import TRAINED_PAIRS, pair_example
from router_training.demo.tasks import TASKS
from router_training.peft_files import save_peft

BASE_NAME = "mora-serve demo base"


@dataclass(frozen=True)
class MixingRecipe:
    """What mixtures the rows of training have.

    ``pairs``: the share of rows with an operation and a style, both at weight 1. ``jitter``: a
    weight is drawn from 1 ± jitter. ``wrong``: the share of rows with a wrong adapter beside the
    right ones, at a weight between 0 and ``wrong_weight``.
    """

    pairs: float = 0.5
    jitter: float = 0.0
    wrong: float = 0.3
    wrong_weight: float = 0.3


def mixed_rows(
    mixing: MixingRecipe,
    seed: int,
    always: tuple[tuple[int, float], ...] = (),
    names: Sequence[str] = tuple(TASKS),
) -> Callable[[], MixedRow]:
    """Rows of single tasks and of the pairs that are trained, each with its mixture.

    ``always`` is part of every mixture. ``names`` are the tasks that there are adapters of, in the
    adapters' order; rows of others do not come.
    """
    pairs = [pair for pair in TRAINED_PAIRS if set(pair) <= set(names)]
    rng = random.Random(f"adapters/{seed}")

    def draw() -> MixedRow:
        if rng.random() < mixing.pairs:
            pair = rng.choice(pairs)
            chosen, example = tuple(pair), pair_example(rng, pair)
        else:
            chosen = (rng.choice(names),)
            example = TASKS[chosen[0]].example(rng)
        weights = {n: 1 + rng.uniform(-mixing.jitter, mixing.jitter) for n in chosen}
        if rng.random() < mixing.wrong:
            other = rng.choice(names)
            weights.setdefault(other, rng.uniform(0, mixing.wrong_weight))
        mixture = tuple((names.index(n), w) for n, w in weights.items())
        return MixedRow(tokens(Row(*example, earlier_turns(rng))), mixture + always)

    return draw


def train_demo_adapters(
    decoder: Decoder,
    recipe: AdapterRecipe,
    mixing: MixingRecipe | None = None,
    log: Log = print,
) -> StackedAdapters:
    """Adapters for all tasks, known and held out, in the order of ``TASKS``."""
    draw = mixed_rows(mixing or MixingRecipe(), recipe.seed)
    return train_adapters(decoder, len(TASKS), draw, recipe, log)


def save_demo_adapters(adapters: StackedAdapters, directory: Path) -> None:
    """One PEFT directory a task under ``directory``."""
    for index, name in enumerate(TASKS):
        save_peft(adapters, index, directory / name, BASE_NAME)
