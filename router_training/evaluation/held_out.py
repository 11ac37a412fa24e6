"""Adapters that join after the fitting: each is left out of a fit once, and told by examples."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from router_training.evaluation.cases import Case, FittingData, by_adapter, texts
from router_training.evaluation.metrics import mean
from router_training.evaluation.routing import single_prompts
from router_training.evaluation.scored import Method, Scored, join

CARD_PROMPTS = 16


@dataclass(frozen=True)
class CrossFit:
    """``figures`` are plain numbers; ``scored`` the prompts of each fold's own adapters, with cards
    of the most examples, and the cases that they come from."""

    figures: dict[str, Any]
    scored: Sequence[tuple[Scored, Sequence[Case]]]

    def joined(self) -> tuple[Scored, Sequence[Case]]:
        """All folds' prompts, as if one router had scored them."""
        return join([scored for scored, _ in self.scored]), [
            case for _, cases in self.scored for case in cases
        ]


def cross_fit(
    method: Method,
    data: FittingData,
    cases: Sequence[Case],
    counts: Sequence[int] = (1, 2, 4, 8, CARD_PROMPTS),
    *,
    folds: int = 5,
    draws: int = 3,
    seed: int = 0,
) -> CrossFit:
    """Fit without each fold's adapters, then register them with few examples among all others.

    No fold has more adapters of a group than it must: an adapter joins others of its group.
    ``cases`` are prompts for one adapter each. ``by_count``: for each number of examples the mean
    accuracy over all adapters and ``draws`` choices of the examples, the least and the greatest
    mean of a choice, and the least adapter's mean. ``by_adapter``: with the most examples.
    """
    parts = split(data, folds, seed)
    positions = by_adapter(cases)
    most = max(counts)
    hits: dict[int, dict[str, list[float]]] = {n: {} for n in counts}
    scored_parts = []
    for part in parts:
        fitted = method(without(data, part))
        own = [cases[i] for name in part for i in positions.get((name,), ())]
        for count in counts:
            for draw in range(draws):
                cards = _cards(data.examples, part, count, f"{seed}/{draw}")
                scored = fitted.register(cards)(texts(own))
                found = single_prompts(scored, own)["by_adapter"]
                for name, row in found.items():
                    hits[count].setdefault(name, []).append(row["top"][0])
                if count == most and draw == 0:
                    scored_parts.append((scored, own))
    by_count = {str(n): _summary(hits[n]) for n in counts}
    figures = {
        "top1": by_count[str(most)]["mean"],
        "by_count": by_count,
        "by_adapter": {n: mean(hits[most][n]) for n in data.examples if n in hits[most]},
        "examples": most,
        "folds": len(parts),
        "draws": draws,
    }
    return CrossFit(figures, scored_parts)


def split(data: FittingData, folds: int, seed: int) -> list[list[str]]:
    """The adapters in folds of about one size, each group's spread as evenly."""
    names = list(data.examples)
    random.Random(seed).shuffle(names)
    names.sort(key=lambda name: data.groups.get(name, ""))
    count = min(folds, len(names))
    return [names[i::count] for i in range(count)]


def without(data: FittingData, names: Sequence[str]) -> FittingData:
    """The data as if these adapters did not exist."""
    examples = {n: cases for n, cases in data.examples.items() if n not in names}
    pairs = [case for case in data.pairs if not set(case.adapters) & set(names)]
    return replace(data, examples=examples, pairs=pairs)


def _cards(
    examples: Mapping[str, Sequence[Case]], new: Sequence[str], count: int, seed: str
) -> dict[str, list[str]]:
    """Example prompts by adapter: ``count`` of a random choice for the new ones."""
    cards = {}
    for name, cases in examples.items():
        if name in new:
            chosen = random.Random(f"{seed}/{name}").sample(range(len(cases)), count)
            cards[name] = [cases[i].prompt for i in chosen]
        else:
            cards[name] = texts(cases[:CARD_PROMPTS])
    return cards


def _summary(hits: Mapping[str, Sequence[float]]) -> dict[str, float]:
    of_draws = [mean(values) for values in zip(*hits.values(), strict=True)]
    by_name = [mean(values) for values in hits.values()]
    return {
        "mean": mean(by_name),
        "lowest_draw": min(of_draws),
        "highest_draw": max(of_draws),
        "least_adapter": min(by_name),
    }
