"""What joint training gives: adapters that compose, and a router that learned with them.

The bundle's base and the demo's tasks, with the same labelled rows each time. Adapters are trained
apart, on single tasks alone; these are then fine-tuned in mixtures together with the router; and
all are trained jointly from scratch. Measured are the exact match of single tasks and of pairs on
fresh prompts, and what a router that has not seen them makes of prompts kept out, without and with
the correction that it learned.

    OMP_NUM_THREADS=1 python -m benchmarks.joint_training --json
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import load_base
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, train_adapters
from router_training.demo.adapters import MixingRecipe, mixed_rows
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.composition import COLUMNS, Composition
from router_training.demo.evaluate import FRESH_SEED
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.pairs import TRAINED_PAIRS, pair_examples
from router_training.demo.tasks import TASKS
from router_training.joint import JointRecipe, train_jointly
from router_training.joint_study import Example, JointData
from router_training.router import FitOptions

NAMES = tuple(TASKS)
SEED = 50_000  # of the rows, plus the run's
OUTSIDE = 512  # prompts of no task, for the router


def main() -> None:
    """Train the three ways and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=AdapterRecipe.steps)
    parser.add_argument("--finetune-steps", type=int, default=AdapterRecipe.steps // 2)
    parser.add_argument("--rows", type=int, default=64, help="labelled rows a task or pair")
    parser.add_argument("--prompts", type=int, default=32, help="fresh prompts a cell")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    base = load_base(BaseConfig(str(bundle_path() / "base"), dtype="fp32", device="cpu"))
    examples = list(labelled(SEED + args.seed, args.rows))
    rng = random.Random(f"joint training/{args.seed}")
    outside = [out_of_domain(rng, "train") for _ in range(OUTSIDE)]
    groups = {name: task.group for name, task in TASKS.items()}
    data = JointData(examples, NAMES, outside, groups, base.fingerprint)
    rows: dict[str, dict[str, Any]] = {}

    def measured(name: str, adapters: StackedAdapters, began: float) -> None:
        seconds = time.monotonic() - began
        found = Composition(base.decoder, adapters, FRESH_SEED, args.prompts).measure()
        rows[name] = {column: found[column] for column in COLUMNS}
        rows[name] |= {"least_pair": found["least_pair"], "seconds": seconds}
        report.log(f"{name}: {rows[name]}")

    recipe = AdapterRecipe(steps=args.steps, seed=args.seed)
    began = time.monotonic()
    draw = mixed_rows(MixingRecipe(pairs=0.0, wrong=0.0), args.seed)
    apart = train_adapters(base.decoder, len(NAMES), draw, recipe, report.log)
    measured("apart", apart, began)
    for name, start, steps in (
        ("fine-tuned", apart, args.finetune_steps),
        ("from scratch", None, args.steps),
    ):
        began = time.monotonic()
        chosen = JointRecipe(replace(recipe, steps=steps), FitOptions(seed=args.seed))
        joint = train_jointly(base.decoder, data, chosen, report.log, start=start)
        measured(name, joint.adapters, began)
        rows[name]["router"] = dict(joint.figures)
    report.emit({"rows": rows, "arguments": vars(args), "environment": report.environment()})


def labelled(seed: int, count: int) -> Iterator[Example]:
    """``count`` rows of each task and of each pair that is trained."""
    for i, task in enumerate(TASKS.values()):
        for prompt, answer in task.examples(seed, count):
            yield Example(prompt, tokens(Row(prompt, answer)), (i,))
    for pair in TRAINED_PAIRS:
        indices = tuple(sorted(map(NAMES.index, pair)))
        for prompt, answer in pair_examples(pair, seed, count):
            yield Example(prompt, tokens(Row(prompt, answer)), indices)


if __name__ == "__main__":
    main()
