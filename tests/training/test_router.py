"""Fitting the router: what it promises on the demo's tasks, and what its parts compute."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import shrunk_covariance
from sklearn.metrics import roc_auc_score

from mora_serve.errors import InvalidArgument
from mora_serve.router.decide import decide
from mora_serve.router.features import NGrams
from mora_serve.router.index import Entry, Index
from mora_serve.router.router import Router
from router_training import router as fitting
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import HELD_OUT, KNOWN, TASKS
from router_training.router import FitReport, fit_router

SMALL = {"features": NGrams(dim=256), "dims": 32, "strengths": (1.0,)}


def prompts(task: str, seed: int, count: int) -> list[str]:
    return [prompt for prompt, _ in TASKS[task].examples(seed, count)]


def outside(seed: int, count: int, split: str = "train") -> list[str]:
    rng = random.Random(seed)
    return [out_of_domain(rng, split) for _ in range(count)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted() -> tuple[bytes, FitReport]:
    """A router of full size, on few prompts."""
    examples = {name: prompts(name, 1, 50) for name in KNOWN}
    return fit_router(examples, outside(1, 300), "base", strengths=(0.3, 1.0), folds=2)


@pytest.fixture(scope="module")
def router(fitted: tuple[bytes, FitReport]) -> Router:
    return Router.load(fitted[0], "base")


@pytest.fixture(scope="module")
def index(router: Router) -> Index:
    """All twelve known adapters and the two registered later, each by 16 prompts of its card."""
    keys = {name: router.key(prompts(name, 3, 16)) for name in TASKS}
    assert all(keys.values())
    return Index.of(("t", Entry(n, k, TASKS[n].group)) for n, k in keys.items() if k)


def top(router: Router, index: Index, text: str) -> str:
    return decide(index.score("t", router.embed(text)), router.calibration, 1).candidates[0].adapter


def accuracy(router: Router, index: Index, tasks: tuple[str, ...]) -> float:
    asked = [(name, text) for name in tasks for text in prompts(name, 99, 40)]
    return float(np.mean([top(router, index, text) == name for name, text in asked]))


def test_prompts_of_known_adapters_reach_them(router: Router, index: Index) -> None:
    assert accuracy(router, index, KNOWN) >= 0.97


def test_so_do_prompts_of_adapters_that_the_fit_has_not_seen(router: Router, index: Index) -> None:
    assert accuracy(router, index, HELD_OUT) >= 0.85


def test_out_of_domain_prompts_get_the_base_and_others_seldom_do(
    router: Router, index: Index
) -> None:
    def best(text: str) -> float:
        return float(index.score("t", router.embed(text)).normed.max())

    inside = [best(text) for name in TASKS for text in prompts(name, 99, 20)]
    others = [best(text) for text in outside(9, 250, "test")]
    labels = [1] * len(inside) + [0] * len(others)
    assert roc_auc_score(labels, inside + others) >= 0.95
    threshold = router.calibration.threshold
    assert np.mean(np.array(inside) < threshold) <= 0.06
    assert np.mean(np.array(others) < threshold) >= 0.9


def test_a_prompt_of_one_task_runs_one_adapter(router: Router, index: Index) -> None:
    asked = [(name, text) for name in KNOWN for text in prompts(name, 98, 20)]
    chosen = [
        decide(index.score("t", router.embed(text)), router.calibration, 2).adapters == (name,)
        for name, text in asked
    ]
    assert np.mean(chosen) >= 0.95


def test_the_file_is_small_and_holds_what_the_fit_measured(
    fitted: tuple[bytes, FitReport], router: Router
) -> None:
    data, report = fitted
    assert len(data) <= 1.2e6
    assert router.content.report == report.numbers()
    assert router.content.known == tuple(sorted(KNOWN))
    assert router.content.fingerprint == "base"
    assert router.dims == 512


def test_the_report_is_on_prompts_kept_out_of_the_fit(fitted: tuple[bytes, FitReport]) -> None:
    report = fitted[1]
    assert report.known >= 0.97
    assert list(report.held_out) == [1, 4, 16]
    assert report.held_out[1] < report.held_out[4] < report.held_out[16] <= 1.0
    assert report.held_out[16] >= 0.85
    assert abs(report.full_rank[16] - report.held_out[16]) < 0.1
    assert report.auroc >= 0.98 > 0.9 <= report.auroc_held_out
    assert (report.abstained + report.abstained_held_out) / 2 <= fitting.REJECTED + 0.01
    assert report.calibration_error < 0.02
    assert set(report.numbers()) >= {"strength", "held_out_16", "full_rank_1"}


def test_the_same_data_give_the_same_file_whatever_their_order() -> None:
    examples = {name: prompts(name, 1, 12) for name in KNOWN[:4]}
    others = outside(1, 80)
    data, _ = fit_router(examples, others, **SMALL)
    turned = {name: examples[name][::-1] for name in reversed(examples)}
    assert fit_router(turned, others[::-1], **SMALL)[0] == data
    assert fit_router(examples, others, seed=1, **SMALL)[0] != data


def test_a_router_may_keep_all_dimensions() -> None:
    examples = {name: prompts(name, 1, 12) for name in KNOWN[:4]}
    data, report = fit_router(examples, outside(1, 80), features=NGrams(dim=64), dims=64)
    assert Router.load(data).dims == 64
    assert report.full_rank == report.held_out


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"examples": {"a": ["x"] * 20}}, "examples"),
        ({"examples": {"a": ["x"], "b": ["y"], "c": ["z"]}}, "examples.a"),
        ({"out_of_domain": ["x"] * 100}, "out_of_domain"),
    ],
)
def test_too_little_data_is_refused(change: dict, field: str) -> None:
    given = {"examples": {n: prompts(n, 1, 12) for n in KNOWN[:3]}, "out_of_domain": outside(1, 80)}
    with pytest.raises(InvalidArgument) as e:
        fit_router(**(given | change), **SMALL)
    assert e.value.field == field


@pytest.mark.parametrize("rows", [6, 40])
def test_whitening_inverts_the_ridged_within_adapter_covariance(rows: int) -> None:
    """With fewer prompts than features and with more."""
    rng = np.random.default_rng(0)
    adapters = [rng.normal(size=(rows, 20)) @ rng.normal(size=(20, 20)) for _ in range(3)]
    whitening = fitting._Whitening.of(adapters)
    matrix = whitening.matrix(0.3, 20, 0)
    spread = np.concatenate([a - a.mean(0) for a in adapters])
    covariance = spread.T @ spread / len(spread)
    ridged = covariance + 0.3 * np.trace(covariance) / 20 * np.eye(20)
    assert np.allclose(1.3 * shrunk_covariance(covariance, shrinkage=0.3 / 1.3), ridged)
    assert np.allclose(matrix @ matrix.T @ ridged, np.eye(20), atol=1e-6)
    assert np.allclose(whitening.mean, np.concatenate(adapters).mean(0))


def test_the_projection_keeps_known_means_and_leaves_other_inner_products_unbiased() -> None:
    rng = np.random.default_rng(0)
    adapters = [rng.normal(size=(30, 200)) + rng.normal(size=200) for _ in range(4)]
    whitening = fitting._Whitening.of(adapters)
    full = whitening.matrix(1.0, 200, 0)
    centred = (whitening.means - whitening.mean) @ full
    probe = rng.normal(size=200) @ full
    exact = probe @ probe
    found = []
    for seed in range(200):
        part = whitening.matrix(1.0, 40, seed)
        kept = (whitening.means - whitening.mean) @ part
        assert np.allclose(kept @ kept.T, centred @ centred.T)
        found.append(np.square(np.linalg.solve(full.T, probe) @ part).sum())
    assert np.mean(found) == pytest.approx(exact, rel=0.05)


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_the_auroc_is_the_usual_one(inside: list[int], others: list[int]) -> None:
    labels = [1] * len(inside) + [0] * len(others)
    expected = roc_auc_score(labels, inside + others)
    assert fitting._auroc(np.array(inside), np.array(others)) == pytest.approx(expected)


def test_the_gate_is_the_likeliest_one() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=4000)
    y = (rng.random(4000) < 1 / (1 + np.exp(-(x - 0.4) / 0.25))).astype(float)
    position, width = fitting._fit_gate(x.astype(np.float32), y)
    assert position == pytest.approx(0.4, abs=0.05)
    assert width == pytest.approx(0.25, abs=0.03)


def test_the_threshold_rejects_a_twentieth() -> None:
    rng = np.random.default_rng(0)
    new = rng.normal(size=100_000)
    thresholds = [fitting._conformal(rng.normal(size=200).astype(np.float32)) for _ in range(300)]
    assert np.mean([(new < t).mean() for t in thresholds]) == pytest.approx(0.05, abs=0.005)
