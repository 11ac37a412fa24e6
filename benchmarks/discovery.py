"""Tasks found in rows without labels: how well adapters and router recover the demo's tasks.

The demo's base in 4 bits learns a pool of adapters from rows of its tasks, shuffled and without
their names. Then fresh prompts are routed by their text alone, and the answers under the adapters
that would run are judged whole. The measure is the adjusted Rand index (Hubert and Arabie, 1985)
against the true tasks: 1 for the same partition, 0 for chance. All prompts that get the base are
one part of their own; those that get several adapters count for the best.

    OMP_NUM_THREADS=1 python -m benchmarks.discovery --json
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.metrics import adjusted_rand_score

from benchmarks import report
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import Base, load_base
from mora_serve.router.router import Router
from router_training.batched import MixedRow
from router_training.clusters import kmeans
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.composition import exact_matches
from router_training.demo.evaluate import FRESH_SEED
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import TASKS
from router_training.discover import DiscoverRecipe, centred, discover
from router_training.discovered import Discovered, UnlabelledRow, measure_losses
from router_training.evaluation.scored import RouterScorer
from router_training.router import fit_router
from router_training.router_data import RouterData

OUTSIDE = 512  # prompts of no task, for the router
SEED = 40_000  # of the rows, plus the run's
BASE = -1  # where an adapter's index stands otherwise: no adapter, the last column of the losses


def main() -> None:
    """Search once a pool size and seed, and report."""
    default = DiscoverRecipe()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--pools", type=int, nargs="*", default=[len(TASKS)], help="their sizes")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--rows", type=int, default=64, help="rows a task to train with")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a task to measure with")
    parser.add_argument("--steps", type=int, default=default.adapters.steps)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    base = load_base(BaseConfig(str(bundle_path() / "base"), dtype="fp32", device="cpu"))
    runs = []
    for pool in args.pools:
        for seed in args.seeds:
            adapters = replace(default.adapters, steps=args.steps, seed=seed)
            recipe = replace(default, adapters=adapters)
            runs.append(measure(base, recipe, pool, args.rows, args.prompts))
            report.log(", ".join(f"{k} {v:.3f}" for k, v in runs[-1].items()))
    report.emit(
        {
            **{name: min(run[name] for run in runs) for name in ("routed_ari", "gate_ari")},
            "runs": runs,
            "arguments": vars(args),
            "environment": report.environment(),
        }
    )


def measure(
    base: Base, recipe: DiscoverRecipe, pool: int, rows: int, prompts: int
) -> dict[str, Any]:
    """One search and its figures.

    ``routed``: by a router fitted on what was found, with keys from 16 prompts a card;
    ``abstained`` and ``mixtures`` are the shares of prompts that it gives to the base and to
    several adapters, ``exact_match`` is under all that it picks, ``loss`` under the best; ``gate``:
    by the search's own gate; ``likelihood``: by the answers' loss, which only training data has;
    ``kmeans``: prompts alone, with as many clusters. ``training``: of the rows of training, by
    both.
    """
    started = time.monotonic()
    seed = recipe.adapters.seed
    given, truth = shuffled(SEED + seed, rows)
    found = discover(base.decoder, given, pool, recipe, report.log)
    seconds = time.monotonic() - started
    fresh, right = shuffled(FRESH_SEED, prompts)
    texts = [row.text for row in fresh]
    answers = [row.tokens for row in fresh]
    losses = measure_losses(
        base.decoder, found.adapters, answers, [*range(found.adapters.count), None]
    )
    by_gate = found.route(texts).argmax(1)
    chosen = by_router(base, found, given, texts)
    routed = [own[0] if own else BASE for own in chosen]
    pairs = zip(answers, chosen, strict=True)
    mixed = [MixedRow(row, tuple((adapter, 1.0) for adapter in own)) for row, own in pairs]
    answered = exact_matches(base.decoder, found.adapters, mixed)
    points = centred(recipe.features.dense([row.text for row in given]))
    alone = kmeans(points, pool, np.random.default_rng(seed))
    return {
        "pool": pool,
        "seed": seed,
        "adapters": found.adapters.count,
        "routed_ari": adjusted_rand_score(right, routed),
        "gate_ari": adjusted_rand_score(right, by_gate),
        "likelihood_ari": adjusted_rand_score(right, losses[:, :-1].argmin(1)),
        "training_ari": adjusted_rand_score(truth, found.assignment),
        "kmeans_ari": adjusted_rand_score(truth, alone),
        "exact_match": float(np.mean(answered)),
        "abstained": float(np.mean([not own for own in chosen])),
        "mixtures": float(np.mean([len(own) > 1 for own in chosen])),
        "loss": float(losses[np.arange(len(routed)), routed].mean()),
        "base_loss": float(losses[:, -1].mean()),
        "seconds": seconds,
    }


def shuffled(seed: int, count: int) -> tuple[list[UnlabelledRow], list[int]]:
    """``count`` rows of each task in one random order, and their tasks' numbers."""
    found = [
        (UnlabelledRow(tokens(Row(prompt, answer)), prompt), number)
        for number, task in enumerate(TASKS.values())
        for prompt, answer in task.examples(seed, count)
    ]
    random.Random(seed).shuffle(found)
    return [row for row, _ in found], [number for _, number in found]


def by_router(
    base: Base, found: Discovered, rows: Sequence[UnlabelledRow], texts: Sequence[str]
) -> list[tuple[int, ...]]:
    """The adapters that the server's router picks for each prompt, best first; none: the base.

    The router is fitted on the prompts of each adapter that was found; its keys are from the
    prompts on the cards.
    """
    rng = random.Random("discovery")
    outside = [out_of_domain(rng) for _ in range(OUTSIDE)]
    data, _ = fit_router(RouterData.of(found.examples(rows), outside), base.fingerprint)
    router = Router.load(data, base.fingerprint)
    scorer = RouterScorer(router, found.card_prompts(rows), groups={})
    picked = [scorer.route(text).adapters for text in texts]
    return [tuple(map(found.names.index, adapters)) for adapters in picked]


if __name__ == "__main__":
    main()
