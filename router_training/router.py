"""Fitting the router: whitened prototypes, and gates calibrated on what the whitening has not seen.

The projection is learnt from labelled prompts and prompts of no adapter (``whitening``). Three
things are chosen by the accuracy on adapters that were kept out of it: λ, how much the prototypes
weigh beside the centre, and whether a learnt correction stays. The gates are then fitted on
prompts in wordings kept out of the whitening: of known adapters, of adapters that are new to it,
of several together, and of none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from mora_serve.router.features import Pool
from mora_serve.router.router import Router
from router_training.gates import fit_gates
from router_training.router_data import RouterData
from router_training.router_report import FitReport, decision_figures
from router_training.router_study import FitOptions, Study

__all__ = ["FitOptions", "fit_router"]

LEAST_GAIN = 0.002  # of accuracy, below which a correction is no better than none


def fit_router(
    data: RouterData,
    fingerprint: str = "",
    options: FitOptions | None = None,
    pool: Pool | None = None,
) -> tuple[bytes, FitReport]:
    """Fit a router on labelled prompts and prompts of no adapter.

    ``pool`` gives the hidden states of prompts where the features have them. ``fingerprint`` is
    the base's; a router of n-grams without one fits any. Without prompts for several adapters,
    some are made by joining prompts. Returns the router's file and the report, which the file
    holds too; equal arguments give equal bytes on one machine.

    Raises InvalidArgument for too little data: it takes 3 adapters with 10 distinct prompts
    each, and 64 distinct prompts of no adapter.
    """
    data.check()
    study = Study.of(data, options or FitOptions(), pool)
    everyone = range(len(study.names))
    order = np.random.default_rng(study.options.seed).permutation(len(study.names))
    count = min(study.options.folds, len(order))
    parts = [sorted(order[i::count].tolist()) for i in range(count)]
    rest = [[i for i in everyone if i not in part] for part in parts]
    bases = [study.whitening(others) for others in rest]

    found: dict[tuple[float, float], dict[int, float]] = {}
    for strength in study.options.strengths:
        routers = [study.router(base, strength) for base in bases]
        for blend in study.options.blends:
            found[strength, blend] = study.held_out(routers, parts, blend)
    strength, blend = max(found, key=lambda key: _mean(found[key]))
    tried = {f"{s:g}_{b:g}": _mean(own) for (s, b), own in found.items()}
    held_out = found[strength, blend]
    routers = [study.router(base, strength, blend) for base in bases]
    kept = False
    if study.options.correct:
        others = [study.corrected(r, o) for r, o in zip(routers, rest, strict=True)]
        corrected = study.held_out(others, parts, blend)
        tried["corrected"] = _mean(corrected)
        if kept := _mean(corrected) > _mean(held_out) + LEAST_GAIN:
            routers, held_out = others, corrected

    def fitted(*, whole: bool) -> Router:
        router = study.router(study.whitening(everyone, whole=whole), strength, blend)
        return study.corrected(router, everyone) if kept else router

    cases = study.cases(fitted(whole=False), None)
    for router, part in zip(routers, parts, strict=True):
        cases += study.cases(router, part)
    calibration = fit_gates(cases, blend)
    halves = cases[::2], cases[1::2]
    report = FitReport(
        strength=strength,
        blend=blend,
        corrected=kept,
        held_out=held_out,
        **_means(
            decision_figures(judges, fit_gates(learnt, blend))
            for learnt, judges in (halves, halves[::-1])
        ),
        tried=tried,
    )
    content = dataclasses.replace(
        fitted(whole=True).content,
        calibration=calibration,
        fingerprint=fingerprint,
        known=tuple(study.names),
        report=report.numbers(),
    )
    return content.to_bytes(), report


def _means(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """By name, over the rows where a figure could be measured."""
    found = list(rows)
    columns = {name: [row[name] for row in found if not math.isnan(row[name])] for name in found[0]}
    return {n: float(np.mean(own)) if own else math.nan for n, own in columns.items()}


def _mean(accuracies: Mapping[int, float]) -> float:
    return float(np.mean(list(accuracies.values())))
