"""A new task from few examples: its adapter trained on top of a shared set, and on its own.

The bundle's base and the demo's tasks. Some tasks are held out: the shared set is trained here
without them, alone and in pairs as the bundle's adapters are. Then an adapter is trained for each
held-out task from 8 to 64 labelled examples, from the usual random start and from the set, with the
same rows, steps and schedule; the learning rate of each way is the best of a small grid on the two
tasks in ``TUNING``, which are not in the set nor in the figures. Measured is the exact match on
fresh prompts, in templates of the examples' kind and in templates that are kept for testing.

    OMP_NUM_THREADS=1 python -m benchmarks.shared_knowledge --json
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, MixedRow, load_peft, save_peft, train_adapters
from router_training.batches import TokenRow
from router_training.demo.adapters import MixingRecipe, mixed_rows
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.composition import exact_matches
from router_training.demo.evaluate import FRESH_SEED
from router_training.demo.tasks import TASKS, Split
from router_training.shared import NewTaskRecipe, Start, train_new_task

TUNING = ("uppercase", "last-word")
MEASURED = ("drop-vowels", "roman", "initials", "brackets")
SHARED = tuple(name for name in TASKS if name not in (*TUNING, *MEASURED))
RATES: Mapping[Start, float] = {"random": 4e-3, "nearest": 4e-3, "mean": 4e-3}
SPLITS: Mapping[str, Split] = {"new_prompts": "train", "new_templates": "test"}


def main() -> None:
    """Train the set, then the new adapters both ways, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tasks", nargs="*", choices=tuple(TASKS), default=list(MEASURED))
    parser.add_argument("--examples", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2], help="of the examples")
    parser.add_argument("--starts", nargs="*", choices=tuple(RATES), default=["random", "mean"])
    parser.add_argument("--steps", type=int, default=NewTaskRecipe.steps)
    parser.add_argument("--rate", type=float, help="the learning rate of every way")
    parser.add_argument("--prompts", type=int, default=64, help="fresh prompts a task and split")
    parser.add_argument("--set-steps", type=int, default=120, help="of the shared set's training")
    parser.add_argument("--set", type=Path, help="a shared set made before, kept here")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    started = time.monotonic()
    base = load_base(BaseConfig(str(bundle_path() / "base"), dtype="fp32", device="cpu"))
    shared = shared_set(base.decoder, args.set_steps, args.set)
    cells = []
    for count, task, seed, start in itertools.product(
        args.examples, args.tasks, args.seeds, args.starts
    ):
        recipe = NewTaskRecipe(steps=args.steps, lr=args.rate or RATES[start], seed=seed)
        rows = examples(task, seed, count)
        adapter = train_new_task(base.decoder, rows, recipe, shared, start, lambda line: None)
        found = exact_match(base.decoder, adapter, task, rows, args.prompts)
        cells.append({"task": task, "seed": seed, "examples": count, "start": start, **found})
        report.log(" ".join(f"{k} {v}" for k, v in cells[-1].items()))
    curves = {
        start: {
            str(count): {split: _mean(cells, start, count, split) for split in SPLITS}
            for count in args.examples
        }
        for start in args.starts
    }
    report.emit(
        {
            "curves": curves,
            "gains": gains(curves),
            "shared": SHARED,
            "cells": cells,
            "seconds": time.monotonic() - started,
            "arguments": {k: str(v) for k, v in vars(args).items()},
            "environment": report.environment(),
        }
    )


def shared_set(decoder: Decoder, steps: int, directory: Path | None) -> StackedAdapters:
    """The adapters of ``SHARED``, trained together; read from ``directory``, or kept there."""
    kept = [directory / name for name in SHARED] if directory else []
    if kept and all(path.exists() for path in kept):
        return load_peft(decoder.shape, kept)
    draw = mixed_rows(MixingRecipe(), 0, names=SHARED)
    adapters = train_adapters(decoder, len(SHARED), draw, AdapterRecipe(steps=steps), report.log)
    for index, path in enumerate(kept):
        save_peft(adapters, index, path)
    return adapters


def examples(task: str, seed: int, count: int, split: Split = "train") -> list[TokenRow]:
    """``count`` labelled examples of a task; the first of a larger count with the same seed."""
    return [tokens(Row(*example)) for example in TASKS[task].examples(seed, count, split)]


def exact_match(
    decoder: Decoder,
    adapter: StackedAdapters,
    task: str,
    seen: Sequence[TokenRow],
    prompts: int,
) -> dict[str, float]:
    """The share of a task's fresh prompts, without those ``seen``, that are answered whole."""
    shares = {}
    for name, split in SPLITS.items():
        fresh = [row for row in examples(task, FRESH_SEED, prompts, split) if row not in seen]
        right = exact_matches(decoder, adapter, [MixedRow(row, ((0, 1.0),)) for row in fresh])
        shares[name] = round(sum(right) / len(right), 4)
    return shares


def gains(curves: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """By start, number of examples and split: exact match above that of the random start."""
    return {
        start: {
            count: {split: value - curves["random"][count][split] for split, value in row.items()}
            for count, row in curve.items()
        }
        for start, curve in curves.items()
        if start != "random" and "random" in curves
    }


def _mean(cells: Sequence[Mapping[str, Any]], start: str, count: int, split: str) -> float:
    values: list[float] = [
        cell[split] for cell in cells if (cell["start"], cell["examples"]) == (start, count)
    ]
    return statistics.mean(values)


if __name__ == "__main__":
    main()
