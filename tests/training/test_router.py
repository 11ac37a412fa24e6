"""Fitting the router: what it promises on the demo's tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from mora_serve.errors import InvalidArgument
from mora_serve.router.features import Features, NGrams, PooledHidden
from mora_serve.router.format import Calibration
from mora_serve.router.router import Router
from router_training.demo.evaluate import routing_summary
from router_training.demo.routing import RouterRecipe, demo_data
from router_training.demo.suite import demo_suite
from router_training.demo.tasks import HELD_OUT, KNOWN, TASKS
from router_training.evaluation.routing import measure_routing
from router_training.evaluation.scored import RouterScorer
from router_training.gates import Case, fit_gates
from router_training.router import LEAST_GAIN, FitOptions, fit_router
from router_training.router_data import Labelled, RouterData
from router_training.router_report import FitReport, decision_figures

SMALL = FitOptions(Features(NGrams(dim=256)), dims=32, strengths=(1.0,), blends=(0.5,), folds=2)


def data(prompts: int = 12, known: tuple[str, ...] = KNOWN[:4]) -> RouterData:
    return demo_data(RouterRecipe(prompts), known)


@pytest.fixture(scope="module")
def fitted() -> tuple[bytes, FitReport]:
    """A router on few prompts, half as wide as the bundle's."""
    recipe = RouterRecipe(prompts=60)
    options = FitOptions(dims=512, strengths=(0.3, 1.0), folds=2)
    return fit_router(demo_data(recipe), "base", options)


@pytest.fixture(scope="module")
def router(fitted: tuple[bytes, FitReport]) -> Router:
    return Router.load(fitted[0], "base")


@pytest.fixture(scope="module")
def measured(router: Router) -> dict[str, float]:
    """With all adapters registered by 16 prompts each."""
    cards = {name: [p for p, _ in TASKS[name].examples(3, 16)] for name in TASKS}
    groups = {name: task.group for name, task in TASKS.items()}
    suite = demo_suite(prompts=8)
    return routing_summary(measure_routing(suite, RouterScorer(router, cards, groups), KNOWN))


def test_prompts_reach_their_adapters(measured: dict[str, float]) -> None:
    assert measured["known_top1_trained_templates"] >= 0.97
    assert measured["known_alone_trained_templates"] >= 0.95
    assert measured["known_top1"] >= 0.9


def test_so_do_prompts_of_adapters_that_the_fit_has_not_seen(measured: dict[str, float]) -> None:
    assert measured["held_out_top1_trained_templates"] >= 0.9


def test_prompts_for_two_run_exactly_both(measured: dict[str, float]) -> None:
    assert measured["pairs_exactly_trained_templates"] >= 0.9


def test_prompts_of_nobody_get_the_base_and_others_seldom_do(measured: dict[str, float]) -> None:
    assert measured["out_of_domain_auroc"] >= 0.95
    assert measured["near_domain_auroc"] >= 0.85
    assert measured["out_of_domain_accepted"] <= 0.1
    assert measured["abstained"] <= 0.12


def test_the_file_holds_what_the_fit_measured(
    fitted: tuple[bytes, FitReport], router: Router
) -> None:
    data, report = fitted
    assert len(data) <= 1.2e6
    assert router.content.report == report.numbers()
    assert router.content.known == tuple(sorted(KNOWN))
    assert not set(HELD_OUT) & set(router.content.known)
    assert router.content.fingerprint == "base"
    assert router.dims == 512


def test_the_report_is_on_prompts_kept_out_of_the_fit(fitted: tuple[bytes, FitReport]) -> None:
    report = fitted[1]
    assert list(report.held_out) == [1, 4, 16]
    assert report.held_out[1] < report.held_out[4] < report.held_out[16] <= 1.0
    assert report.held_out[16] >= 0.85
    assert report.known >= 0.8
    assert report.together >= 0.7
    assert report.auroc_far >= 0.95
    assert report.auroc_near >= 0.9
    assert report.abstained <= 0.07
    assert report.calibration_error < 0.05
    assert len(report.tried) == 7
    plain = max(value for name, value in report.tried.items() if name != "corrected")
    assert report.corrected == (report.tried["corrected"] > plain + LEAST_GAIN)
    chosen = report.tried["corrected"] if report.corrected else plain
    assert np.mean(list(report.held_out.values())) == chosen


def test_the_report_is_of_gates_that_have_not_seen_what_judges_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All prompts judge once, under gates fitted on others; the file's gates are fitted on all."""
    seen_by: dict[Calibration, list[Case]] = {}
    judged: list[Case] = []

    def fit(cases: Sequence[Case], blend: float) -> Calibration:
        calibration = fit_gates(cases, blend)
        seen_by[calibration] = list(cases)
        return calibration

    def judge(cases: Sequence[Case], calibration: Calibration) -> dict[str, float]:
        assert not {id(case) for case in cases} & {id(case) for case in seen_by[calibration]}
        judged.extend(cases)
        return decision_figures(cases, calibration)

    monkeypatch.setattr("router_training.router.fit_gates", fit)
    monkeypatch.setattr("router_training.router.decision_figures", judge)
    file, _ = fit_router(data(), options=SMALL)
    everything = max(seen_by.values(), key=len)
    assert sorted(map(id, judged)) == sorted(map(id, everything))
    assert seen_by[Router.load(file).calibration] == everything


def test_the_same_data_give_the_same_file_whatever_their_order() -> None:
    given = data()
    first, _ = fit_router(given, options=SMALL)
    turned = RouterData(given.labelled[::-1], given.near[::-1], given.far[::-1], given.groups)
    assert fit_router(turned, options=SMALL)[0] == first
    assert fit_router(given, options=dataclasses.replace(SMALL, seed=1))[0] != first


def test_hidden_states_are_features_beside_n_grams_or_alone() -> None:
    """States that tell what the text does not: the router learns from them, and says so."""
    examples = {
        name: [f"{i} {name[:1]} plain text of number {i}" for i in range(20)]
        for name in ("first", "second", "third")
    }
    outside = [f"{i} n plain text of number {i}" for i in range(80)]

    def pool(texts: Sequence[str]) -> np.ndarray:
        """A direction for each adapter, which one letter of the text decides."""
        rng = np.random.default_rng(0)
        directions = dict(zip("fstn", np.eye(16), strict=False))
        rows = [3 * directions[t.split()[1]] + rng.normal(size=16) / 4 for t in texts]
        return np.stack(rows).astype(np.float32)

    hidden, given = PooledHidden(1, 16), RouterData.of(examples, outside)
    found = {}
    for features in (Features(NGrams(64)), Features(None, hidden), Features(NGrams(64), hidden)):
        options = dataclasses.replace(SMALL, features=features, dims=16)
        file, report = fit_router(given, "base", options, pool)
        assert Router.load(file, "base").content.features == features
        found[features.kind] = report
    assert found["hidden"].known == found["both"].known == 1.0
    assert found["hidden"].auroc_far > 0.9
    with pytest.raises(InvalidArgument) as e:
        fit_router(given, "base", dataclasses.replace(SMALL, features=Features(None, hidden)))
    assert e.value.field == "pooled"


def test_a_router_may_keep_all_dimensions() -> None:
    options = dataclasses.replace(SMALL, features=Features(NGrams(dim=64)), dims=64)
    assert Router.load(fit_router(data(), options=options)[0]).dims == 64


def test_data_without_near_prompts_and_mixtures_are_enough() -> None:
    given = data(20)
    alone = RouterData([r for r in given.labelled if len(r.adapters) == 1], far=given.far)
    _, report = fit_router(alone, options=SMALL)
    assert np.isnan(report.auroc_near)
    assert np.isfinite(report.together)


def test_prompts_for_three_are_learnt_from_as_well() -> None:
    given = data(20)
    three = [Labelled(f"{'now ' * i}do all three", KNOWN[:3]) for i in range(12)]
    more = dataclasses.replace(given, labelled=[*given.labelled, *three])
    assert np.isfinite(fit_router(more, options=SMALL)[1].together)


def test_too_little_data_is_refused() -> None:
    with pytest.raises(InvalidArgument) as e:
        fit_router(RouterData.of({"a": ["x"] * 20}, ["y"]), options=SMALL)
    assert e.value.field == "examples"
