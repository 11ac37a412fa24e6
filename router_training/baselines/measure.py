"""Every baseline on the suite that the bundle's own router is measured on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mora_serve.router.features import NGrams
from router_training.baselines.arrow import ArrowModel
from router_training.baselines.classifiers import (
    centroids,
    logistic_regression,
    perceptron,
)
from router_training.baselines.plain import Encode, exact_match, plain_model
from router_training.baselines.xlora import XLoraModel, XLoraRecipe
from router_training.batched import Log
from router_training.evaluation.bundle import calibrated
from router_training.evaluation.cases import Case, Suite, texts
from router_training.evaluation.costs import join_ms, timed_fit
from router_training.evaluation.held_out import cross_fit
from router_training.evaluation.metrics import Array, mean
from router_training.evaluation.quality import Model, own_mixtures, routed_mixtures
from router_training.evaluation.routing import measure_routing
from router_training.evaluation.scored import Method, Scored, Scorer

FEW = 12  # prompts a task and pair for what runs through transformers
ARROW_SETTINGS = ((3, 1.0), (1, 1.0), (2, 0.1))  # (top_k, temperature); the first is PEFT's own


@dataclass(frozen=True)
class PeftBundle:
    """What PEFT needs of a bundle: directories, and how a case becomes tokens."""

    base: Path
    adapters: Mapping[str, Path]
    encode: Encode


def measure_classifiers(
    suite: Suite,
    known: Sequence[str],
    cards: Mapping[str, Sequence[str]],
    features: NGrams,
    log: Log,
) -> dict[str, Any]:
    """Routing figures, those of adapters held out of the training, and costs, by method.

    ``features`` are those that the server's router has. ``fitted_on``: the number of adapters
    that a method is trained on. ``join_ms``: of a method that is not trained anew for a newcomer.
    The MLP is held out with the most examples alone: each training of it takes seconds.
    """
    methods: dict[str, tuple[Method, Sequence[int]]] = {
        "centroids": (centroids(features), (1, 2, 4, 8, 16)),
        "logistic regression": (logistic_regression(features), (1, 2, 4, 8, 16)),
        "MLP": (perceptron(features), (16,)),
    }
    out = {}
    for name, (method, counts) in methods.items():
        log(name)
        later = cross_fit(method, suite.fitting, suite.kept_templates, counts)
        fitted, scorer, seconds = timed_fit(method, suite.fitting, cards)
        out[name] = {
            "routing": measure_routing(suite, scorer, known),
            "later": later.figures,
            "calibration": calibrated(suite, scorer, later),
            "fitted_on": len(suite.fitting.examples),
            "fit_seconds": seconds,
            "prompts": suite.prompts,
            "milliseconds": _milliseconds(scorer, texts(suite.kept_templates)),
        }
        if name == "centroids":
            out[name]["join_ms"] = join_ms(fitted, cards)
    return out


class _PeftRouter(Protocol):
    def right(self, cases: Sequence[Case]) -> Array: ...

    def __call__(self, prompts: Sequence[str]) -> Scored: ...


def measure_peft(
    bundle: PeftBundle,
    suite: Suite,
    known: Sequence[str],
    training: Sequence[Case],
    recipe: XLoraRecipe,
    log: Log,
) -> dict[str, Any]:
    """Arrow and X-LoRA through transformers, on fewer prompts.

    Of Arrow's settings the one that answers most of ``training``'s prompts is taken; X-LoRA's
    gates are trained on all of them. ``seconds`` are for the exact match of all pairs' prompts,
    ``plain_seconds`` those of the base alone.
    """
    few = suite.fewer(FEW)
    plain = plain_model(bundle.base)
    rows = [bundle.encode(case) for case in few.pairs_kept.both()]
    started = time.perf_counter()
    exact_match(plain, rows)
    plain_seconds = time.perf_counter() - started
    tried: list[tuple[float, int, ArrowModel, str]] = []
    for top_k, temperature in ARROW_SETTINGS:
        arrow = ArrowModel(bundle.base, bundle.adapters, bundle.encode, top_k, temperature)
        share = mean(arrow.right(training[:: max(1, len(training) // 120)]))
        log(f"Arrow, top {top_k}, temperature {temperature}: {share:.3f}")
        tried.append((share, -len(tried), arrow, f"top {top_k}, temperature {temperature}"))
    _, _, arrow, setting = max(tried, key=lambda row: row[:2])
    xlora = XLoraModel(bundle.base, bundle.adapters, bundle.encode, recipe)
    started = time.perf_counter()
    xlora.train(training, log)
    trained = time.perf_counter() - started
    out: dict[str, Any] = {}
    for name, model in (("Arrow", arrow), ("X-LoRA", xlora)):
        log(name)
        out[name] = _of_peft(model, few, known) | {"plain_seconds": round(plain_seconds, 2)}
    out["Arrow"] |= {"setting": setting, "fit_seconds": 0.0, "fitted_on": 0}
    out["X-LoRA"] |= {
        "setting": f"{recipe.steps} steps of {recipe.rows} rows",
        "fit_seconds": round(trained, 1),
        "fitted_on": len({name for case in training for name in case.adapters}),
    }
    return out


def _of_peft(router: _PeftRouter, few: Suite, known: Sequence[str]) -> dict[str, Any]:
    single = router.right(few.kept_templates)
    started = time.perf_counter()
    trained, held_out = router.right(few.pairs_kept.trained), router.right(few.pairs_kept.held_out)
    seconds = time.perf_counter() - started
    return {
        "routing": measure_routing(few, router, known),
        "quality": {
            "single": mean(single),
            "pairs_trained": mean(trained),
            "pairs_held_out": mean(held_out),
        },
        "prompts": few.prompts,
        "seconds": round(seconds, 2),
    }


def ours_on_few(suite: Suite, model: Model, scorer: Scorer) -> dict[str, Any]:
    """Our routed and oracle quality on the prompts that PEFT's routers are measured on."""
    few = suite.fewer(FEW)
    parts = {
        "single": few.kept_templates,
        "pairs_trained": few.pairs_kept.trained,
        "pairs_held_out": few.pairs_kept.held_out,
    }
    return {
        "routed": {
            k: mean(model.right(cases, routed_mixtures(scorer, cases)))
            for k, cases in parts.items()
        },
        "oracle": {k: mean(model.right(cases, own_mixtures(cases))) for k, cases in parts.items()},
        "prompts": few.prompts,
    }


def _milliseconds(scorer: Scorer, prompts: Sequence[str], repeat: int = 50) -> float:
    """The median time of one prompt on its own."""
    found = []
    for prompt in prompts[:repeat]:
        started = time.perf_counter()
        scorer([prompt])
        found.append(1e3 * (time.perf_counter() - started))
    return round(float(np.median(found)), 3)
