"""Whether the models answer rightly: greedy answers under any mixture, and shares of right ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from router_training.evaluation.cases import Case, PairCases, Suite, by_adapter, texts
from router_training.evaluation.metrics import Array, mean
from router_training.evaluation.scored import Scorer

Mixture = Mapping[str, float]
BESIDE = 0.3  # the weight of a wrong adapter beside the right one


class Model(Protocol):
    """A base with adapters."""

    names: tuple[str, ...]

    def right(self, cases: Sequence[Case], mixtures: Sequence[Mixture], system: str = "") -> Array:
        """1.0 where the whole greedy answer is right, else 0.0 [n]; ``system`` is a turn ahead."""
        ...


def own_mixtures(cases: Sequence[Case]) -> list[Mixture]:
    """Each case's right adapters at weight 1."""
    return [dict.fromkeys(case.adapters, 1.0) for case in cases]


def measure_quality(suite: Suite, model: Model, scorer: Scorer) -> dict[str, Any]:
    """Shares of prompts whose whole answer is right.

    ``single`` and ``pairs``: under the right adapters (``oracle``) and under those that the
    router picks (``routed``), on new prompts in trained templates and on kept templates.
    ``baselines``: what else one could run for a pair. ``beside_wrong``: the right adapter with
    another one at weight 0.3.
    """
    out: dict[str, Any] = {"single": _single(suite, model, scorer)}
    if suite.pairs.both():
        out["pairs"] = _pairs(suite, model, scorer)
        out["baselines"] = pair_baselines(suite.pairs, model, suite.seed)
    if suite.three_way:
        right = model.right(suite.three_way, own_mixtures(suite.three_way))
        out["three_way"] = {"mean": mean(right), "prompts": len(right)}
    if len(model.names) > 1:
        out["beside_wrong"] = beside_wrong(suite.trained_templates, model)
    return out


def _single(suite: Suite, model: Model, scorer: Scorer) -> dict[str, Any]:
    fresh, kept = suite.trained_templates, suite.kept_templates
    columns = {
        "new_prompts": model.right(fresh, own_mixtures(fresh)),
        "new_prompts_routed": model.right(fresh, routed_mixtures(scorer, fresh)),
        "base": model.right(fresh, [{}] * len(fresh)),
    }
    of_kept = {
        "new_templates": model.right(kept, own_mixtures(kept)),
        "new_templates_routed": model.right(kept, routed_mixtures(scorer, kept)),
    }
    rows: dict[str, dict[str, float]] = {}
    for cases, found in ((fresh, columns), (kept, of_kept)):
        for (name, *_), at in by_adapter(cases).items():
            rows.setdefault(name, {}).update({k: mean(v[at]) for k, v in found.items()})
    means = {k: mean(v) for k, v in (columns | of_kept).items()}
    return {
        "by_adapter": rows,
        "means": means,
        "least": {k: min(row[k] for row in rows.values()) for k in means},
        "routed_over_oracle": {
            name: ratio(means[f"{name}_routed"], means[name])
            for name in ("new_prompts", "new_templates")
        },
    }


def _pairs(suite: Suite, model: Model, scorer: Scorer) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for templates, pairs in (("trained", suite.pairs), ("kept", suite.pairs_kept)):
        cases = pairs.both()
        oracle = model.right(cases, own_mixtures(cases))
        routed = model.right(cases, routed_mixtures(scorer, cases))
        out[f"{templates}_templates"] = {
            "oracle": _by_pair(oracle, pairs),
            "routed": _by_pair(routed, pairs),
            "routed_over_oracle": ratio(mean(routed), mean(oracle)),
        }
    return out


def _by_pair(right: Array, pairs: PairCases) -> dict[str, Any]:
    """Means over all pairs, over those trained together and over the others, and the least."""
    trained = set(by_adapter(pairs.trained))
    shares = {names: mean(right[at]) for names, at in by_adapter(pairs.both()).items()}
    out: dict[str, Any] = {"mean": mean(right), "least": min(shares.values())}
    for name, wanted in (("trained", True), ("held_out", False)):
        some = [share for names, share in shares.items() if (names in trained) == wanted]
        out[name] = {"mean": mean(some), "least": min(some, default=0.0)}
    out["by_pair"] = [
        {"adapters": list(names), "trained": names in trained, "right": share}
        for names, share in shares.items()
    ]
    return out


def pair_baselines(pairs: PairCases, model: Model, seed: int, few: int = 8) -> dict[str, Any]:
    """What prompts for a pair get from one adapter alone, from all, and from a random pair.

    The first ``few`` prompts of each pair. ``best_single``: for each pair the adapter, of all, that
    answers most of its prompts, chosen on these very prompts. ``uniform``: all adapters at weight
    1/n. ``uniform_full``: all at weight 1. ``random_pair``: two different adapters, drawn for each
    prompt. ``right_pair``, the right two on these prompts, is what they are compared with.
    """
    by_pair = [at[:few] for at in by_adapter(pairs.both()).values()]
    cases = [pairs.both()[i] for at in by_pair for i in at]
    names = model.names
    rng = random.Random(f"random-pair/{seed}")
    single = np.stack([model.right(cases, [{name: 1.0}] * len(cases)) for name in names])
    best = np.zeros(len(cases))
    for at in by_adapter(cases).values():
        best[at] = single[:, at].mean(1).max()
    others: dict[str, list[Mixture]] = {
        "right_pair": own_mixtures(cases),
        "uniform": [dict.fromkeys(names, 1 / len(names))] * len(cases),
        "uniform_full": [dict.fromkeys(names, 1.0)] * len(cases),
        "random_pair": [dict.fromkeys(rng.sample(names, 2), 1.0) for _ in cases],
        "base": [{}] * len(cases),
    }
    found = {name: model.right(cases, mixtures) for name, mixtures in others.items()}
    trained = set(by_adapter(pairs.trained))
    together = np.array([case.adapters in trained for case in cases])
    out: dict[str, Any] = {
        name: {
            "mean": mean(right),
            "trained": mean(right[together]),
            "held_out": mean(right[~together]),
        }
        for name, right in ({"best_single": best} | found).items()
    }
    return {
        **out,
        "best_single_highest": round(float(best.max()), 4),
        "prompts": len(cases),
        "prompts_a_pair": max(map(len, by_pair)),
    }


def beside_wrong(cases: Sequence[Case], model: Model, weight: float = BESIDE) -> dict[str, Any]:
    """Prompts for one adapter, which runs at 1 with another one beside it at ``weight``.

    Each of the other adapters in turn is the wrong one. ``kept``: the share of the exact match
    of the right adapter alone.
    """
    mixtures: list[Mixture] = [{}] * len(cases)
    for (name, *_), at in by_adapter(cases).items():
        others = [n for n in model.names if n != name]
        for j, i in enumerate(at):
            mixtures[i] = {name: 1.0, others[j % len(others)]: weight}
    alone, beside = model.right(cases, own_mixtures(cases)), model.right(cases, mixtures)
    rows = {
        name: {"alone": mean(alone[at]), "beside": mean(beside[at])}
        for (name, *_), at in by_adapter(cases).items()
    }
    return {
        "weight": weight,
        "alone": mean(alone),
        "beside": mean(beside),
        "kept": ratio(mean(beside), mean(alone)),
        "by_adapter": rows,
    }


def routed_mixtures(scorer: Scorer, cases: Sequence[Case]) -> list[Mixture]:
    """The adapters that the router picks for each case, at weight 1."""
    return [dict.fromkeys(chosen, 1.0) for chosen in scorer(texts(cases)).chosen]


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 of nothing."""
    return round(part / whole, 4) if whole else 0.0
