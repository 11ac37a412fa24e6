"""One bundle measured on one suite: every figure that the claims and the report use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_training.batched import Log
from router_training.evaluation.answers import Answering
from router_training.evaluation.cases import Case, FittingData, Suite, check_adapters, texts
from router_training.evaluation.costs import join_ms, timed_fit
from router_training.evaluation.held_out import CrossFit, cross_fit, without
from router_training.evaluation.keymap import key_map
from router_training.evaluation.latency import measure_latency
from router_training.evaluation.metrics import mean
from router_training.evaluation.quality import measure_quality, own_mixtures
from router_training.evaluation.routing import calibration, measure_routing
from router_training.evaluation.scored import Method, RouterScorer, Scored, Scorer
from router_training.evaluation.sizes import measure_sizes

SYSTEM_TURN = "You are a helpful assistant. Answer briefly and do not explain."


@dataclass(frozen=True)
class Subject:
    """What is measured: models, router, and how its router would be fitted again.

    ``known`` names the adapters that the router was fitted on. ``fit`` chooses all anew, as its
    fitting did; ``refit`` takes over what that chose. ``parts`` are the directories whose sizes
    count, all under ``directory``.
    """

    model: Answering
    scorer: RouterScorer
    known: Sequence[str]
    fit: Method
    refit: Method
    directory: Path
    parts: Mapping[str, Path]


def measure(subject: Subject, suite: Suite, log: Log) -> dict[str, Any]:
    """Every figure of a bundle, nested by section, ready for JSON."""
    for cases in (suite.trained_templates, suite.kept_templates, suite.pairs.both()):
        check_adapters(cases, subject.model.names)
    log("routing")
    out: dict[str, Any] = {
        "prompts": suite.prompts,
        "seed": suite.seed,
        "known": sorted(subject.known),
        "routing": measure_routing(suite, subject.scorer, subject.known),
    }
    if suite.fitting.examples:
        log("adapters held out of the fitting")
        later = cross_fit(subject.refit, suite.fitting, suite.kept_templates)
        out["later"] = later.figures
        out["calibration"] = calibrated(suite, subject.scorer, later)
    log("answers")
    out["quality"] = measure_quality(suite, subject.model, subject.scorer)
    out["system_turn"] = _after_system_turn(suite.kept_templates, subject.model)
    log("map, latency, sizes")
    out["map"] = key_map(subject.scorer, suite.kept_templates, suite.near, suite.far)
    out["latency"] = measure_latency(subject.scorer, texts(suite.kept_templates))
    out["sizes"] = measure_sizes(subject.parts, subject.directory, subject.scorer.index)
    return out


def measure_costs(subject: Subject, data: FittingData) -> dict[str, float]:
    """The seconds of one whole fitting on the known adapters, and what one more takes after it."""
    cards = subject.scorer.cards
    new = [name for name in data.examples if name not in subject.known]
    fitted, _, seconds = timed_fit(subject.fit, without(data, new), cards)
    return {"fit_seconds": seconds, "join_ms": join_ms(fitted, cards)}


def calibrated(suite: Suite, scorer: Scorer, later: CrossFit) -> dict[str, Any] | None:
    """Calibration over equally many known, later-registered, new-template and nobody's prompts."""
    new_templates = [*suite.kept_templates, *suite.reworded]
    parts: list[tuple[Scored, Sequence[Case]]] = [
        (scorer(texts(cases)), cases)
        for cases in (suite.trained_templates, new_templates, suite.near)
        if cases
    ]
    return calibration([*parts, later.joined()])


def _after_system_turn(cases: Sequence[Case], model: Answering) -> float:
    return mean(model.right(cases, own_mixtures(cases), SYSTEM_TURN))
