"""Training many adapters in one batched pass against one after another.

The demo's base and its tasks, an adapter a task. Three ways take the same number of steps with the
same rows an adapter, learning rate and schedule: one batched pass, in which a step moves all
adapters, timed before and after the next way (the mean counts); the same trainer with one adapter
after another; and PEFT's model in a plain loop, one after another, as adapters are trained
elsewhere (the base dequantised to fp32, its fastest form here). Then each adapter answers fresh
prompts; only the whole answer counts.

    OMP_NUM_THREADS=2 python -m benchmarks.batched_training --json
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import Base, load_base
from mora_serve.model.stacked import StackedAdapters
from router_training.baselines.plain import exact_match as exact_match_of
from router_training.baselines.plain import plain_model
from router_training.batched import AdapterRecipe, MixedRow, rate, train_adapters, trained_through
from router_training.batches import bucketed, collate
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
    decoder = trained_through(base.decoder)
    together, batched_seconds = timed(decoder, names, recipe)
    right = [exact_match(base, together, i, n, args.prompts) for i, n in enumerate(names)]
    alone, seconds = [], 0.0
    for name in names:
        adapter, took = timed(decoder, [name], replace(recipe, rows=args.rows))
        alone.append(exact_match(base, adapter, 0, name, args.prompts))
        seconds += took
        report.log(f"{name}: {right[len(alone) - 1]:.2f} batched, {alone[-1]:.2f} on its own")
    again = timed(decoder, names, recipe)[1]  # after the others: a machine's pace drifts
    batched_seconds = statistics.mean((batched_seconds, again))
    peers, peft_seconds = with_peft(names, replace(recipe, rows=args.rows), args.prompts)
    means = [sum(values) / len(names) for values in (right, alone, peers)]
    report.emit(
        {
            "adapters": len(names),
            "batched_seconds": batched_seconds,
            "one_after_another_seconds": seconds,
            "peft_seconds": peft_seconds,
            "speedup": seconds / batched_seconds,
            "speedup_over_peft": peft_seconds / batched_seconds,
            "batched_exact_match": means[0],
            "one_after_another_exact_match": means[1],
            "peft_exact_match": means[2],
            "quality_lost": max(means[1:]) - means[0],
            "tasks": dict(zip(names, zip(right, alone, peers, strict=True), strict=True)),
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


def timed(
    decoder: Decoder, names: Sequence[str], recipe: AdapterRecipe
) -> tuple[StackedAdapters, float]:
    """Adapters for these tasks, in order, and the seconds that their steps took."""
    started = time.perf_counter()
    adapters = train_adapters(decoder, len(names), rows_of(names), recipe, report.log)
    return adapters, time.perf_counter() - started


def with_peft(
    names: Sequence[str], recipe: AdapterRecipe, prompts: int
) -> tuple[list[float], float]:
    """Exact match of each task's adapter trained by PEFT on its own, and the steps' seconds."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=int(recipe.alpha),
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    right, seconds = [], 0.0
    for name in names:
        torch.manual_seed(recipe.seed)
        model = get_peft_model(plain_model(bundle_path() / "base"), config)
        started = time.perf_counter()
        train_peft(model, rows_of([name]), recipe)
        seconds += time.perf_counter() - started
        fresh = [tokens(Row(*case)) for case in TASKS[name].examples(FRESH_SEED, prompts)]
        right.append(float(exact_match_of(model, fresh).mean()))
        report.log(f"{name}: {right[-1]:.2f} by PEFT, {seconds:.0f} s")
    return right, seconds


def train_peft(model: Any, draw: Callable[[], MixedRow], recipe: AdapterRecipe) -> None:
    """The steps of ``train_adapters`` on PEFT's model."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    batches = bucketed(draw, lambda row: len(row.tokens), recipe.rows, random.Random(recipe.seed))
    model.train()
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        batch = collate([row.tokens for row in next(batches)])
        logits = model(input_ids=batch.inputs).logits
        losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, reduction="none")
        loss = ((losses * batch.answer).sum(1) / batch.answer.sum(1)).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
    model.eval()


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
