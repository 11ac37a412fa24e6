"""A new task from few examples: its adapter trained on top of a shared set, and on its own.

The bundle's base and its adapters, and tasks that come later: the base has no code for them, and no
adapter serves them. From 8 to 64 labelled examples an adapter is trained twice with the same rows,
steps and schedule: from chance at several learning rates, of which the best in the mean over tasks
counts, and from what ``router_training.shared`` finds in the set, at one learning rate. Measured is
the exact match on fresh prompts, in templates of the examples' kind and in others.

    OMP_NUM_THREADS=1 python -m benchmarks.shared_knowledge --json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import MixedRow
from router_training.batches import TokenRow
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.composition import exact_matches
from router_training.demo.evaluate import FRESH_SEED
from router_training.demo.new_tasks import NEW_TASKS
from router_training.demo.tasks import TASKS, Split
from router_training.peft_files import load_peft
from router_training.shared import NewTaskRecipe, best_start, train_new_task

SPLITS: Mapping[str, Split] = {"new_prompts": "train", "new_templates": "test"}


def main() -> None:
    """Train the new adapters both ways, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tasks", nargs="*", choices=tuple(NEW_TASKS), default=list(NEW_TASKS))
    parser.add_argument("--examples", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="of the examples")
    parser.add_argument("--steps", type=int, default=NewTaskRecipe.steps)
    parser.add_argument("--rates", type=float, nargs="*", default=[2e-3, 4e-3, 8e-3], help="alone")
    parser.add_argument("--prompts", type=int, default=100, help="fresh prompts a task and split")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    started = time.monotonic()
    base = load_base(BaseConfig(str(bundle_path() / "base"), dtype="fp32", device="cpu"))
    shared = load_peft(base.shape, [bundle_path() / "adapters" / name for name in TASKS])
    study = _Study(base.decoder, shared, args.steps, args.prompts)
    cells = []
    for case in itertools.product(args.examples, args.tasks, args.seeds):
        cells += [study.alone(*case, rate) for rate in args.rates]
        cells.append(study.on_top(*case))
    curves = {
        str(count): {
            "alone": best_rate(cells, count, args.rates),
            "on_top": means(cells, examples=count, way="on_top"),
        }
        for count in args.examples
    }
    for count, curve in curves.items():
        curve["gain"] = {split: curve["on_top"][split] - curve["alone"][split] for split in SPLITS}
        report.log(f"{count} examples: {curve}")
    report.emit(
        {
            "curves": curves,
            "cells": cells,
            "seconds": time.monotonic() - started,
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


class _Study:
    """Trains one adapter and measures it."""

    def __init__(self, decoder: Decoder, shared: StackedAdapters, steps: int, prompts: int) -> None:
        self.decoder, self.shared, self.steps, self.prompts = decoder, shared, steps, prompts

    def alone(self, count: int, task: str, seed: int, rate: float) -> dict[str, Any]:
        recipe = NewTaskRecipe(steps=self.steps, seed=seed, lr=rate)
        rows = examples(task, seed, count)
        adapter = train_new_task(self.decoder, rows, recipe, log=_quiet)
        way = {"way": "alone", "rate": rate}
        return self._cell(adapter, rows, {"task": task, "seed": seed, "examples": count, **way})

    def on_top(self, count: int, task: str, seed: int) -> dict[str, Any]:
        recipe = NewTaskRecipe(steps=self.steps, seed=seed)
        rows = examples(task, seed, count)
        began = time.monotonic()
        start = best_start(self.decoder, rows, self.shared, recipe, _quiet)
        seconds = time.monotonic() - began
        adapter = train_new_task(self.decoder, rows, recipe, self.shared, start, _quiet)
        name = start if isinstance(start, str) else tuple(TASKS)[start]
        way = {"way": "on_top", "start": name, "trial_seconds": round(seconds, 1)}
        return self._cell(adapter, rows, {"task": task, "seed": seed, "examples": count, **way})

    def _cell(
        self, adapter: StackedAdapters, seen: Sequence[TokenRow], case: dict[str, Any]
    ) -> dict[str, Any]:
        """The case with the shares of fresh prompts, without those seen, answered whole."""
        for name, split in SPLITS.items():
            fresh = examples(case["task"], FRESH_SEED, self.prompts, split)
            rows = [MixedRow(row, ((0, 1.0),)) for row in fresh if row not in seen]
            right = exact_matches(self.decoder, adapter, rows)
            case[name] = round(sum(right) / len(right), 4)
        report.log(" ".join(f"{k} {v}" for k, v in case.items()))
        return case


def examples(task: str, seed: int, count: int, split: Split = "train") -> list[TokenRow]:
    """``count`` labelled examples of a task; the first of a larger count with the same seed."""
    return [tokens(Row(*example)) for example in NEW_TASKS[task].examples(seed, count, split)]


def means(cells: Sequence[Mapping[str, Any]], **case: object) -> dict[str, float]:
    """Mean exact match by split of the cells that agree with ``case``."""
    found = [cell for cell in cells if case.items() <= cell.items()]
    return {split: statistics.mean(cell[split] for cell in found) for split in SPLITS}


def best_rate(
    cells: Sequence[Mapping[str, Any]], count: int, rates: Sequence[float]
) -> dict[str, float]:
    """Alone, for each split the means of the learning rate that is best there."""
    found = [means(cells, examples=count, rate=rate) for rate in rates]
    return {split: max(row[split] for row in found) for split in SPLITS}


def _quiet(line: str) -> None:
    pass


if __name__ == "__main__":
    main()
