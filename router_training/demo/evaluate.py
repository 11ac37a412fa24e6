"""How good a bundle is, measured on fresh prompts; nothing of it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mora_serve.router.features import NGrams
from router_training.baselines.measure import (
    PeftBundle,
    measure_classifiers,
    measure_peft,
    ours_on_few,
)
from router_training.baselines.xlora import XLoraRecipe
from router_training.batched import Log
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.loaded import LoadedBundle
from router_training.demo.suite import FRESH_SEED, demo_suite, fitting_data
from router_training.evaluation.answers import Answering
from router_training.evaluation.bundle import Subject, measure, measure_costs
from router_training.evaluation.cases import Suite
from router_training.evaluation.refit import ours

__all__ = ["FRESH_SEED", "demo_subject", "evaluate", "summary"]


def evaluate(
    bundle: Path,
    seed: int = FRESH_SEED,
    prompts: int = 48,
    log: Log = lambda line: None,
    xlora: XLoraRecipe | None = None,
) -> dict[str, Any]:
    """Measure a bundle directory on ``prompts`` prompts a task, pair and kind of template.

    Answers are generated greedily on the server's decoder; only the whole answer counts. The
    result holds the headline figures (``summary``), and every section under ``sections``. Given a
    recipe for X-LoRA's gates, other ways to route are measured besides: ``baselines`` by name,
    and ``ours_on_few``, our answers on the prompts that those which take long are measured on.
    """
    subject, suite = demo_subject(bundle, seed, prompts)
    sections = measure(subject, suite, log)
    out = {**summary(sections), "sections": sections}
    if xlora is not None:
        log("one whole fitting")
        sections |= measure_costs(subject, suite.fitting)
        out["baselines"] = _baselines(subject, suite, xlora, log)
        out["ours_on_few"] = ours_on_few(suite, subject.model, subject.scorer)
    return out


def _baselines(subject: Subject, suite: Suite, xlora: XLoraRecipe, log: Log) -> dict[str, Any]:
    ngrams = subject.scorer.router.content.features.ngrams
    peft = PeftBundle(
        base=subject.parts["base"],
        adapters={name: subject.parts["adapters"] / name for name in subject.model.names},
        encode=lambda case: tokens(Row(case.prompt, case.answer)),
    )
    singles = [case for cases in suite.fitting.examples.values() for case in cases]
    training = [*singles, *suite.fitting.pairs]
    return {
        **measure_classifiers(suite, subject.known, subject.scorer.cards, ngrams or NGrams(), log),
        **measure_peft(peft, suite, subject.known, training, xlora, log),
    }


def demo_subject(bundle: Path, seed: int, prompts: int) -> tuple[Subject, Suite]:
    """A bundle of the demo's tasks, loaded, and the prompts to measure it with."""
    loaded = LoadedBundle(bundle)
    manifest = loaded.manifest
    subject = Subject(
        model=Answering(loaded.base, loaded.adapters, loaded.names),
        scorer=loaded.scorer,
        known=tuple(a.name for a in manifest.adapters if a.router == "known"),
        fit=ours(loaded.router.content, loaded.pool, search=True),
        refit=ours(loaded.router.content, loaded.pool),
        directory=bundle,
        parts={
            "base": bundle / manifest.base,
            "adapters": bundle / "adapters",
            "router": bundle / manifest.router,
        },
    )
    suite = replace(demo_suite(seed, prompts), fitting=fitting_data(loaded.names, manifest.seed))
    return subject, suite


def summary(sections: dict[str, Any]) -> dict[str, Any]:
    """The headline figures, flat: what the claims and the bundle's card state."""
    quality, routing, later = sections["quality"], sections["routing"], sections["later"]
    single, pairs, baselines = quality["single"], quality["pairs"], quality["baselines"]
    trained, kept = pairs["trained_templates"], pairs["kept_templates"]
    return {
        "tasks": single["by_adapter"],
        "new_prompts_mean": single["means"]["new_prompts"],
        "new_prompts_least": single["least"]["new_prompts"],
        "new_templates_mean": single["means"]["new_templates"],
        "new_templates_least": single["least"]["new_templates"],
        "base_mean": single["means"]["base"],
        "new_prompts_routed_mean": single["means"]["new_prompts_routed"],
        "new_templates_routed_mean": single["means"]["new_templates_routed"],
        "system_turn_mean": sections["system_turn"],
        "routed_over_oracle_single": single["routed_over_oracle"]["new_prompts"],
        "routed_over_oracle_single_new_templates": single["routed_over_oracle"]["new_templates"],
        "pairs_trained_mean": trained["oracle"]["trained"]["mean"],
        "pairs_trained_least": trained["oracle"]["trained"]["least"],
        "pairs_held_out_mean": trained["oracle"]["held_out"]["mean"],
        "pairs_held_out_least": trained["oracle"]["held_out"]["least"],
        "pairs_least": trained["oracle"]["least"],
        "pairs_new_templates_trained_mean": kept["oracle"]["trained"]["mean"],
        "pairs_new_templates_held_out_mean": kept["oracle"]["held_out"]["mean"],
        "pairs_routed_mean": trained["routed"]["mean"],
        "pairs_new_templates_routed_mean": kept["routed"]["mean"],
        "routed_over_oracle_pairs": trained["routed_over_oracle"],
        "routed_over_oracle_pairs_new_templates": kept["routed_over_oracle"],
        "best_single_mean": baselines["best_single"]["mean"],
        "best_single_max": baselines["best_single_highest"],
        "uniform": max(baselines[name]["mean"] for name in ("uniform", "uniform_full")),
        "random_pair": baselines["random_pair"]["mean"],
        "three_way": quality["three_way"]["mean"],
        "beside_wrong_kept": quality["beside_wrong"]["kept"],
        "router": _router_summary(routing, later, sections["calibration"]),
        "prompts_a_task": sections["prompts"],
        "seed": sections["seed"],
        "bytes": sections["sizes"]["whole"],
    }


def _router_summary(
    routing: dict[str, Any], later: dict[str, Any], calibration: dict[str, Any]
) -> dict[str, float]:
    return {
        **routing_summary(routing),
        **{f"later_{n}_prompts": row["mean"] for n, row in later["by_count"].items()},
        "later_least": later["by_count"][str(later["examples"])]["least_adapter"],
        "calibration_error": calibration["error"],
        "calibration_error_every": calibration["every"],
    }


def routing_summary(routing: dict[str, Any]) -> dict[str, float]:
    """The headline figures of ``measure_routing``, flat."""
    far, near = routing["roc"]["far"], routing["roc"]["near"]
    trained = routing["trained_templates"]
    return {
        **{k: routing[k] for k in ("known_top1", "known_alone", "abstained")},
        **{k: routing[k] for k in ("held_out_top1", "held_out_alone") if k in routing},
        **{f"{k}_trained_templates": v for k, v in trained.items() if k != "pairs"},
        "pairs_exactly_trained_templates": trained["pairs"]["exactly"],
        "reworded_top1": routing["reworded"]["top"][0],
        "new_words_top1": routing["new_words"]["top"][0],
        "pairs_both_on_top": routing["pairs"]["both_on_top"],
        "pairs_exactly": routing["pairs"]["exactly"],
        "out_of_domain_auroc": far["auroc"],
        "out_of_domain_accepted": far["accepted"],
        "near_domain_auroc": near["auroc"],
        "near_domain_accepted": near["accepted"],
    }
