"""The demo's router: what it is fitted on, and the fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from router_training.demo.loaded import ROUTER_FILE
from router_training.demo.suite import fitting_data
from router_training.demo.tasks import KNOWN
from router_training.evaluation.refit import router_data
from router_training.router import FitOptions, fit_router
from router_training.router_data import RouterData
from router_training.router_report import FitReport


@dataclass(frozen=True)
class RouterRecipe:
    """``prompts`` a task beside its card's; see ``suite.fitting_data`` for the others."""

    prompts: int = 120
    options: FitOptions = field(default_factory=FitOptions)
    seed: int = 0


def demo_data(recipe: RouterRecipe, known: Sequence[str] = KNOWN) -> RouterData:
    """What the router of the known tasks is fitted on."""
    return router_data(fitting_data(known, recipe.seed, recipe.prompts))


def fit_demo_router(fingerprint: str, recipe: RouterRecipe, directory: Path) -> FitReport:
    """Fit on known tasks only and write the router's file into ``directory``."""
    data, report = fit_router(demo_data(recipe), fingerprint, recipe.options)
    (directory / ROUTER_FILE).write_bytes(data)
    return report
