"""The demo's router: what it is fitted on, and how well it routes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mora_serve.router.features import NGrams
from router_training.demo.loaded import ROUTER_FILE, LoadedBundle
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import KNOWN, TASKS
from router_training.router import FitReport, fit_router


@dataclass(frozen=True)
class RouterRecipe:
    """How many prompts of each known task, and of no task, the router is fitted on."""

    prompts: int = 120
    out_of_domain: int = 512
    features: NGrams = field(default_factory=NGrams)
    seed: int = 0


def fit_demo_router(fingerprint: str, recipe: RouterRecipe, directory: Path) -> FitReport:
    """Fit on known tasks only and write the router's file into ``directory``."""
    examples = {
        name: [prompt for prompt, _ in TASKS[name].examples(recipe.seed + 1, recipe.prompts)]
        for name in KNOWN
    }
    rng = random.Random(f"router/{recipe.seed}")
    outside = [out_of_domain(rng, "train") for _ in range(recipe.out_of_domain)]
    data, report = fit_router(
        examples, outside, fingerprint, features=recipe.features, seed=recipe.seed
    )
    (directory / ROUTER_FILE).write_bytes(data)
    return report


def measure_router(loaded: LoadedBundle, seed: int, prompts: int) -> dict[str, float]:
    """How the router does on templates and out-of-domain prompts that no fitting has seen.

    ``prompts`` is their number a task. ``*_top1``: the right adapter scores best among all.
    ``*_alone``: exactly it runs. ``out_of_domain_auroc``: of the abstention's score, prompts of
    all tasks against out-of-domain ones. ``abstained``: the share of the tasks' prompts that get
    the base; ``out_of_domain_accepted``: that of the others that get an adapter.
    """
    found: dict[str, list[bool]] = {
        f"{kind}_{what}": [] for kind in ("known", "held_out") for what in ("top1", "alone")
    }
    inside = []
    abstained = []
    for name in loaded.names:
        kind = "known" if name in KNOWN else "held_out"
        for prompt, _ in TASKS[name].examples(seed, prompts, "test"):
            scores, chosen = loaded.scores(prompt), loaded.route(prompt).adapters
            found[f"{kind}_top1"].append(scores.names[int(scores.cosine.argmax())] == name)
            found[f"{kind}_alone"].append(chosen == (name,))
            inside.append(float(scores.normed.max()))
            abstained.append(not chosen)
    rng = random.Random(f"evaluate/{seed}")
    others = [out_of_domain(rng, "test") for _ in range(prompts * 8)]
    outside = [float(loaded.scores(prompt).normed.max()) for prompt in others]
    accepted = [bool(loaded.route(prompt).adapters) for prompt in others]
    return {
        **{name: round(float(np.mean(values)), 4) for name, values in found.items()},
        "out_of_domain_auroc": round(auroc(inside, outside), 4),
        "abstained": round(float(np.mean(abstained)), 4),
        "out_of_domain_accepted": round(float(np.mean(accepted)), 4),
    }


def auroc(inside: list[float], outside: list[float]) -> float:
    """The probability that an inside score is above an outside one; ties count half."""
    a, b = np.array(inside)[:, None], np.array(outside)[None]
    return float((a > b).mean() + 0.5 * (a == b).mean())
