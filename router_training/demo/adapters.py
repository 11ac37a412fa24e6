"""The demo's adapters: one a task, all trained in one batched pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import StackedAdapters
from router_training.batched import AdapterRecipe, Log, MixedRow, save_peft, train_adapters
from router_training.demo.base import tokens
from router_training.demo.coded import Row, earlier_turns
from router_training.demo.tasks import TASKS

BASE_NAME = "mora-serve demo base"


def task_rows(names: Sequence[str], seed: int) -> Callable[[], MixedRow]:
    """Rows of single tasks: adapter i, at weight 1, answers a prompt of ``names[i]``."""
    rng = random.Random(f"adapters/{seed}")

    def draw() -> MixedRow:
        index = rng.randrange(len(names))
        prompt, answer = TASKS[names[index]].example(rng)
        return MixedRow(tokens(Row(prompt, answer, earlier_turns(rng))), ((index, 1.0),))

    return draw


def train_demo_adapters(
    decoder: Decoder, recipe: AdapterRecipe, log: Log = print
) -> StackedAdapters:
    """Adapters for all tasks, known and held out, in the order of ``TASKS``."""
    names = tuple(TASKS)
    return train_adapters(decoder, len(names), task_rows(names, recipe.seed), recipe, log)


def save_demo_adapters(adapters: StackedAdapters, directory: Path) -> None:
    """One PEFT directory a task under ``directory``."""
    for index, name in enumerate(TASKS):
        save_peft(adapters, index, directory / name, BASE_NAME)
