"""The demo's router: what it is fitted on, and how well it routes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from router_training.demo.loaded import ROUTER_FILE
from router_training.demo.measure import Routes, answers, figures, questions
from router_training.demo.near_domain import near_domain
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.pairs import PAIRS, pair_examples
from router_training.demo.tasks import KNOWN, TASKS
from router_training.router import FitOptions, fit_router
from router_training.router_data import Labelled, RouterData
from router_training.router_report import FitReport


@dataclass(frozen=True)
class RouterRecipe:
    """How many prompts the router is fitted on: of each known task, of each pair of these, and of
    no task in the wording of the tasks (near) or in any other (far)."""

    prompts: int = 120
    pairs: int = 16
    near: int = 600
    far: int = 512
    options: FitOptions = field(default_factory=FitOptions)
    seed: int = 0


def demo_data(recipe: RouterRecipe, known: Sequence[str] = KNOWN) -> RouterData:
    """Prompts of some tasks in the templates for training, and prompts of none."""
    labelled = [
        Labelled(prompt, (name,))
        for name in known
        for prompt, _ in TASKS[name].examples(recipe.seed + 1, recipe.prompts)
    ]
    labelled += [
        Labelled(prompt, tuple(pair))
        for pair in PAIRS
        if set(pair) <= set(known)
        for prompt, _ in pair_examples(pair, recipe.seed + 1, recipe.pairs)
    ]
    rng = random.Random(f"router/{recipe.seed}")
    return RouterData(
        labelled,
        near=[near_domain(rng, "train") for _ in range(recipe.near)],
        far=[out_of_domain(rng, "train") for _ in range(recipe.far)],
        groups={name: TASKS[name].group for name in known},
    )


def measure_router(
    router: Routes, seed: int, prompts: int, known: Sequence[str] = KNOWN
) -> dict[str, float]:
    """How a router does that was fitted on ``known`` tasks: see ``measure.figures``.

    ``prompts`` is the number of prompts a task and wording; see ``measure.questions``.
    """
    return figures(answers(router, questions(router.names, seed, prompts)), known)


def fit_demo_router(fingerprint: str, recipe: RouterRecipe, directory: Path) -> FitReport:
    """Fit on known tasks only and write the router's file into ``directory``."""
    data, report = fit_router(demo_data(recipe), fingerprint, recipe.options)
    (directory / ROUTER_FILE).write_bytes(data)
    return report
