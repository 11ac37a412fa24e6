"""A made-up result of an evaluation in which no two figures are equal."""

from __future__ import annotations

import itertools

import pytest

from router_training.demo.evaluate import summary

TASKS = ("reverse", "json")
KINDS = ("new_prompts", "new_prompts_routed", "base", "new_templates", "new_templates_routed")


@pytest.fixture
def result():
    """As ``evaluate`` gives it, for two tasks; shares differ in three digits, tasks' in two."""
    coarse = (n / 100 for n in itertools.count(11))
    fine = (n / 1000 for n in itertools.count(501))

    def each(*names):
        return {name: next(fine) for name in names}

    def of_pairs(right):
        by_pair = [{"adapters": ["reverse", "json"], "trained": True, "right": right}]
        parts = {name: each("mean", "least") for name in ("trained", "held_out")}
        return {**each("mean", "least"), **parts, "by_pair": by_pair}

    def templates():
        return {
            "oracle": of_pairs(0.9),
            "routed": of_pairs(0.8),
            **each("routed_over_oracle"),
        }

    def routing():
        return {
            **each("known_top1", "known_alone", "abstained"),
            "trained_templates": {
                **each("known_top1", "known_alone"),
                "pairs": each("exactly"),
            },
            "reworded": {"top": [next(fine)]},
            "new_words": {"top": [next(fine)]},
            "pairs": each("both_on_top", "exactly"),
            "roc": {kind: each("auroc", "accepted") for kind in ("far", "near")},
        }

    def later():
        counts = {str(n): each("mean", "least_adapter") for n in (4, 8, 16)}
        return {**each("top1"), "by_count": counts, "examples": 16}

    mixtures = ("right_pair", "best_single", "uniform", "uniform_full", "random_pair", "base")
    sections = {
        "prompts": 48,
        "seed": 1_000_003,
        "known": ["reverse"],
        "routing": routing(),
        "later": later(),
        "calibration": each("error", "every"),
        "quality": {
            "single": {
                "by_adapter": {name: {kind: next(coarse) for kind in KINDS} for name in TASKS},
                "means": each(*KINDS),
                "least": each(*KINDS),
                "routed_over_oracle": each("new_prompts", "new_templates"),
            },
            "pairs": {f"{kind}_templates": templates() for kind in ("trained", "kept")},
            "baselines": {
                **{name: each("mean", "trained", "held_out") for name in mixtures},
                **each("best_single_highest"),
                "prompts": 16,
                "prompts_a_pair": 8,
            },
            "three_way": {**each("mean"), "prompts": 96},
            "beside_wrong": {
                "weight": 0.3,
                **each("alone", "beside", "kept"),
                "by_adapter": {name: each("alone", "beside") for name in TASKS},
            },
        },
        "system_turn": next(fine),
        "map": {
            "stress": 0.2,
            "keys": {"reverse": [0.0, 1.0], "json": [1.0, 0.0]},
            "prompts": {"reverse": [[0.1, 0.9]], "json": [[0.9, 0.2]]},
            "near": [],
            "far": [[0.5, 0.5]],
        },
        "latency": [
            {"adapters": 2, "features_ms": 0.21, "decision_ms": 0.42, "decision_p99_ms": 0.84},
            {"adapters": 100, "features_ms": 0.22, "decision_ms": 0.52, "decision_p99_ms": 0.94},
        ],
        "sizes": {"base": 1.1e6, "adapters": 2.2e6, "router": 3.3e6, "keys": 4.4e6, "whole": 6.6e6},
        "fit_seconds": 7.25,
        "join_ms": 1.75,
    }
    peft = ("single", "pairs_trained", "pairs_held_out")
    baselines = {
        name: {"routing": routing(), "later": later(), "calibration": each("error"), **costs}
        for name, costs in {
            "centroids": {"fitted_on": 15, "fit_seconds": 0.5, "join_ms": 2.5},
            "logistic regression": {"fitted_on": 15, "fit_seconds": 3.25},
            "MLP": {"fitted_on": 15, "fit_seconds": 9.75},
        }.items()
    }
    for milliseconds, row in enumerate(baselines.values(), 3):
        row["milliseconds"] = float(milliseconds)
    baselines |= {
        name: {"routing": routing(), "quality": each(*peft), "prompts": 12, **costs}
        for name, costs in {
            "Arrow": {"fitted_on": 0, "fit_seconds": 0.0, "seconds": 6.0, "setting": "top 3"},
            "X-LoRA": {"fitted_on": 15, "fit_seconds": 80.0, "seconds": 4.0, "setting": "9 steps"},
        }.items()
    }
    for name in ("Arrow", "X-LoRA"):
        baselines[name]["plain_seconds"] = 2.0
    few = {"routed": each(*peft), "oracle": each(*peft), "prompts": 12}
    found = {"sections": sections, "baselines": baselines, "ours_on_few": few}
    return {**summary(sections), **found}
