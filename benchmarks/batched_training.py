"""Training many adapters in one batched pass against one after another.

The demo's base in 4 bits and its tasks, an adapter a task. Both ways take the same number of steps
with the same number of rows an adapter, learning rate and schedule; batched, one step moves all
adapters. Then each adapter answers fresh prompts, generated greedily; only the whole answer counts.

    OMP_NUM_THREADS=2 python -m benchmarks.batched_training --json
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import Base, load_base
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, MixedRow, train_adapters
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.evaluate import FRESH_SEED
from router_training.demo.tasks import TASKS
from router_training.generation import greedy


def main() -> None:
    """Train both ways and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=7, help="rows an adapter and step")
    parser.add_argument("--prompts", type=int, default=48, help="prompts a task to measure with")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    base = load_base(BaseConfig(str(bundle_path() / "base"), dtype="fp32", device="cpu"))
    names = tuple(TASKS)
    recipe = AdapterRecipe(steps=args.steps, rows=args.rows * len(names))
    together, batched_seconds = timed(base, names, recipe)
    right = [exact_match(base, together, i, n, args.prompts) for i, n in enumerate(names)]
    alone, seconds = [], 0.0
    for name in names:
        adapter, took = timed(base, [name], replace(recipe, rows=args.rows))
        alone.append(exact_match(base, adapter, 0, name, args.prompts))
        seconds += took
        report.log(f"{name}: {right[len(alone) - 1]:.2f} batched, {alone[-1]:.2f} on its own")
    means = [sum(values) / len(names) for values in (right, alone)]
    report.emit(
        {
            "adapters": len(names),
            "batched_seconds": batched_seconds,
            "one_after_another_seconds": seconds,
            "speedup": seconds / batched_seconds,
            "batched_exact_match": means[0],
            "one_after_another_exact_match": means[1],
            "quality_lost": means[1] - means[0],
            "tasks": dict(zip(names, zip(right, alone, strict=True), strict=True)),
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


def timed(base: Base, names: Sequence[str], recipe: AdapterRecipe) -> tuple[StackedAdapters, float]:
    """Adapters for these tasks, in order, and the seconds that their steps took."""
    started = time.perf_counter()
    adapters = train_adapters(base.decoder, len(names), rows_of(names), recipe, report.log)
    return adapters, time.perf_counter() - started


def rows_of(names: Sequence[str]) -> Callable[[], MixedRow]:
    """Rows of the tasks in turn, so that each gets as many as the others."""
    turns = itertools.cycle(range(len(names)))
    rngs = [random.Random(f"batched/{name}") for name in names]

    def draw() -> MixedRow:
        i = next(turns)
        return MixedRow(tokens(Row(*TASKS[names[i]].example(rngs[i]))), ((i, 1.0),))

    return draw


def exact_match(
    base: Base, adapters: StackedAdapters, index: int, name: str, prompts: int
) -> float:
    """The share of a task's fresh prompts that its adapter answers rightly."""
    cases = TASKS[name].examples(FRESH_SEED, prompts)
    ids = [base.tokenizer.chat([("user", prompt)]) for prompt, _ in cases]
    weights = torch.zeros(len(ids), adapters.count)
    weights[:, index] = 1.0
    limit = 1 + max(len(answer.encode()) for _, answer in cases)
    found = greedy(base.decoder, ids, base.tokenizer.eos_ids, limit, adapters, weights)
    texts = [base.tokenizer.decode(answer) for answer in found]
    right = sum(text == answer for text, (_, answer) in zip(texts, cases, strict=True))
    return right / prompts


if __name__ == "__main__":
    main()
