"""What the demo's figures are to reach, beside what."""

from __future__ import annotations

from router_training.report.overview import Headline

_TWO = {"centroids": "centroids", "logistic regression": "logistic regression"}


def _routing(path: str) -> dict[str, str]:
    return {label: f"baselines.{name}.{path}" for label, name in _TWO.items()}


HEADLINES: tuple[Headline, ...] = (
    Headline(
        "right adapter, new prompts: mean",
        "new_prompts_mean",
        ">=",
        0.95,
        {"base alone": "base_mean", "kept templates": "new_templates_mean"},
    ),
    Headline("right adapter, new prompts: least adapter", "new_prompts_least", ">=", 0.85),
    Headline(
        "known adapters, new prompts: top 1",
        "router.known_top1_trained_templates",
        ">=",
        0.99,
        _routing("routing.trained_templates.known_top1"),
    ),
    Headline(
        "known adapters, kept templates: top 1",
        "router.known_top1",
        ">=",
        0.80,
        _routing("routing.known_top1"),
    ),
    Headline(
        "adapters registered later, 16 examples: top 1",
        "router.later_16_prompts",
        ">=",
        0.93,
        {
            "8 examples": "router.later_8_prompts",
            "4 examples": "router.later_4_prompts",
            **_routing("later.top1"),
        },
    ),
    Headline(
        "new sentences, half of the words known: top 1",
        "router.reworded_top1",
        ">=",
        0.80,
        {"other words": "router.new_words_top1"},
    ),
    Headline(
        "prompts of nobody, far: AUROC",
        "router.out_of_domain_auroc",
        ">=",
        0.98,
        _routing("routing.roc.far.auroc"),
    ),
    Headline(
        "prompts of nobody, near: AUROC",
        "router.near_domain_auroc",
        ">=",
        0.90,
        _routing("routing.roc.near.auroc"),
    ),
    Headline(
        "calibration error of the best candidate",
        "router.calibration_error",
        "<=",
        0.05,
        {
            "every candidate": "router.calibration_error_every",
            "logistic regression": "baselines.logistic regression.calibration.error",
        },
    ),
    Headline(
        "routed over right adapter, new prompts: one task",
        "routed_over_oracle_single",
        ">=",
        0.99,
        {
            "routed": "new_prompts_routed_mean",
            "right adapter": "new_prompts_mean",
            "the ratio on kept templates": "routed_over_oracle_single_new_templates",
        },
    ),
    Headline(
        "routed over right adapters, new prompts: pairs",
        "routed_over_oracle_pairs",
        ">=",
        0.95,
        {
            "routed": "pairs_routed_mean",
            "right pair picked": "router.pairs_exactly_trained_templates",
            "the ratio on kept templates": "routed_over_oracle_pairs_new_templates",
        },
    ),
    Headline(
        "pairs trained together",
        "pairs_trained_mean",
        ">=",
        0.95,
        {
            "least pair": "pairs_trained_least",
            "kept templates": "pairs_new_templates_trained_mean",
        },
    ),
    Headline(
        "pairs never trained together",
        "pairs_held_out_mean",
        ">=",
        0.80,
        {
            "least pair": "pairs_held_out_least",
            "kept templates": "pairs_new_templates_held_out_mean",
            "all adapters": "uniform",
            "random two": "random_pair",
        },
    ),
    Headline("best single adapter on pairs", "best_single_mean", "<=", 0.05),
    Headline("kept beside a wrong adapter at 0.3", "beside_wrong_kept", ">=", 0.90),
    Headline("three-way mixes", "three_way"),
)
"""The figures that the project asks of its demo, with their bars."""
