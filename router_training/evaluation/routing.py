"""How well a router routes: by adapter, by kind of prompt, and what it leaves to the base."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from router_training.evaluation.cases import Case, PairCases, Suite, by_adapter, texts
from router_training.evaluation.metrics import (
    Array,
    all_on_top,
    mean,
    ranks,
    reliability,
    roc,
    thinned,
)
from router_training.evaluation.scored import Scored, Scorer
from router_training.router_report import auroc

MOST = 4  # adapters looked at in top-k
NOBODY = "none"


def measure_routing(suite: Suite, scorer: Scorer, known: Collection[str]) -> dict[str, Any]:
    """Figures of a router with all adapters registered; it was fitted on ``known``.

    ``single``: prompts for one adapter in kept templates. ``*_top1``: the right adapter scores
    best; ``*_alone``: it runs, and nothing beside it. ``pairs``: see ``_pairs``. Those in
    ``trained_templates`` are the same on new operands in templates of the training. ``roc``: of
    the abstention's score, prompts of all adapters and pairs in kept templates against prompts of
    none.
    """
    single = scorer(texts(suite.kept_templates))
    out: dict[str, Any] = {
        "single": single_prompts(single, suite.kept_templates),
        **_by_known(single, suite.kept_templates, known),
        "abstained": mean([not c for c in single.chosen]),
        "trained_templates": _by_known(
            scorer(texts(suite.trained_templates)), suite.trained_templates, known
        ),
    }
    for name in ("reworded", "new_words"):
        if cases := getattr(suite, name):
            out[name] = single_prompts(scorer(texts(cases)), cases)
    inside = [single.inside]
    if suite.pairs_kept.both():
        scored = scorer(texts(suite.pairs_kept.both()))
        inside.append(scored.inside)
        out["pairs"] = _pairs(scored, suite.pairs_kept)
        both = suite.pairs.both()
        out["trained_templates"]["pairs"] = _pairs(scorer(texts(both)), suite.pairs)
    out["roc"] = {}
    for name in ("far", "near"):
        if cases := getattr(suite, name):
            outside = scorer(texts(cases))
            out["roc"][name] = _roc(np.concatenate(inside), outside)
    return out


def single_prompts(scored: Scored, cases: Sequence[Case]) -> dict[str, Any]:
    """Top-k accuracy and exact choice, in the mean and by adapter, and who is taken for whom.

    ``confusion.rows``: shares of an adapter's prompts by what would run first, the last column
    standing for nothing.
    """
    top, alone = _top(scored, cases), _exactly(scored, cases)
    rows, confusion = {}, []
    columns = [*scored.names, NOBODY]
    first = [chosen[0] if chosen else NOBODY for chosen in scored.chosen]
    for (name, *_), at in by_adapter(cases).items():
        rows[name] = {
            "top": [mean(top[at, k]) for k in range(top.shape[1])],
            "alone": mean(alone[at]),
        }
        taken = [first[i] for i in at]
        confusion.append([mean([t == column for t in taken]) for column in columns])
    return {
        "top": [mean(top[:, k]) for k in range(top.shape[1])],
        "alone": mean(alone),
        "prompts": len(cases),
        "by_adapter": rows,
        "confusion": {"right": list(rows), "ran": columns, "rows": confusion},
    }


def _by_known(scored: Scored, cases: Sequence[Case], known: Collection[str]) -> dict[str, float]:
    """Top-1 and exact choice, of adapters that the router was fitted on and of others apart."""
    of_known = np.array([case.adapters[0] in known for case in cases], bool)
    top, alone = _top(scored, cases)[:, 0], _exactly(scored, cases)
    out: dict[str, float] = {}
    for name, part in (("known", of_known), ("held_out", ~of_known)):
        if part.any():
            out |= {f"{name}_top1": mean(top[part]), f"{name}_alone": mean(alone[part])}
    return out


def calibration(
    parts: Sequence[tuple[Scored, Sequence[Case]]], bins: int = 10
) -> dict[str, Any] | None:
    """Reliability of the best candidate's probability, over equally many prompts of each part.

    ``every``: the calibration error over every candidate with a probability above 0.01. None for
    a method without probabilities.
    """
    if any(scored.probability is None for scored, _ in parts):
        return None
    least = min(len(cases) for _, cases in parts)
    best, right, every, every_right = [], [], [], []
    for scored, cases in parts:
        at = np.linspace(0, len(cases) - 1, least).round().astype(int)
        probability, wanted = _known(scored)[at], scored.wanted(cases)[at]
        first = scored.ranking[at].argmax(1)
        rows = np.arange(least)
        best.append(probability[rows, first])
        right.append(wanted[rows, first])
        likely = probability > 0.01
        every.append(probability[likely])
        every_right.append(wanted[likely])
    out = reliability(np.concatenate(best), np.concatenate(right), bins)
    over_every = reliability(np.concatenate(every), np.concatenate(every_right), bins)
    return {**out, "every": over_every["error"], "prompts": least * len(parts)}


def _known(scored: Scored) -> Array:
    if scored.probability is None:
        raise TypeError("this method gives no probabilities")
    return scored.probability


def _top(scored: Scored, cases: Sequence[Case]) -> Array:
    """[n, k]: whether the right adapter is among the k + 1 best."""
    count = min(MOST, len(scored.names))
    before = ranks(scored.ranking, scored.truth(cases))
    out: Array = (before[:, None] <= np.arange(count)).astype(np.float64)
    return out


def _exactly(scored: Scored, cases: Sequence[Case]) -> Array:
    """[n]: whether the right adapters run, and nothing beside them."""
    pairs = zip(scored.chosen, cases, strict=True)
    return np.array([set(chosen) == set(case.adapters) for chosen, case in pairs], np.float64)


def _pairs(scored: Scored, cases: PairCases) -> dict[str, Any]:
    """``both_on_top``: the two right adapters score best; ``exactly``: they and no other run."""
    both = cases.both()
    on_top = all_on_top(scored.ranking, scored.wanted(both))
    exactly = _exactly(scored, both)
    cut = len(cases.trained)
    parts = {"trained": slice(cut), "held_out": slice(cut, None)}
    return {
        "both_on_top": mean(on_top),
        "exactly": mean(exactly),
        "abstained": mean([not chosen for chosen in scored.chosen]),
        **{
            name: {"both_on_top": mean(on_top[part]), "exactly": mean(exactly[part])}
            for name, part in parts.items()
        },
    }


def _roc(inside: Array, outside: Scored) -> dict[str, Any]:
    false, true = thinned(*roc(inside, outside.inside))
    return {
        "auroc": round(auroc(inside, outside.inside), 4),
        "accepted": mean([bool(chosen) for chosen in outside.chosen]),
        "prompts": len(outside.inside),
        "false": false,
        "true": true,
    }
