"""Routing figures: each is the share that it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from router_training.evaluation.cases import Case, texts
from router_training.evaluation.routing import calibration, measure_routing, single_prompts
from router_training.evaluation.scored import Scored
from tests.training.suites import among


def scored(ranking, chosen, probability=None):
    names = ("a", "b", "c")
    ranking = np.array(ranking, float)
    p = None if probability is None else np.array(probability, float)
    return Scored(names, ranking, p, ranking.max(1), tuple(chosen))


def test_single_prompts_count_hits_and_mistakes():
    """Top-k, exact choice, and who was taken for whom."""
    cases = [Case("1", ("a",)), Case("2", ("a",)), Case("3", ("b",)), Case("4", ("b",))]
    found = single_prompts(
        scored(
            [[3, 2, 1], [2, 3, 1], [1, 3, 2], [3, 1, 2]],
            [("a",), ("b",), ("b", "c"), ()],
        ),
        cases,
    )
    assert found["top"] == [0.5, 0.75, 1.0]
    assert found["alone"] == 0.25
    assert found["by_adapter"]["a"] == {"top": [0.5, 1.0, 1.0], "alone": 0.5}
    assert found["confusion"]["ran"] == ["a", "b", "c", "none"]
    assert found["confusion"]["rows"] == [[0.5, 0.5, 0, 0], [0, 0.5, 0, 0.5]]


def test_calibration_takes_equally_many_of_each_part():
    """A large part does not drown a small one."""
    cases = [Case("x", ("a",))]
    sure = scored([[1, 0, 0]], [("a",)], [[0.8, 0.0, 0.0]])
    wrong = scored([[1, 0, 0]] * 9, [("a",)] * 9, [[0.8, 0.0, 0.0]] * 9)
    nobody = [Case("y")] * 9
    found = calibration([(sure, cases), (wrong, nobody)], bins=1)
    assert found["prompts"] == 2
    assert found["bins"] == [{"probability": 0.8, "right": 0.5, "prompts": 2}]
    assert found["error"] == pytest.approx(0.3)


def test_a_method_without_probabilities_has_no_calibration():
    """Then there is nothing to compare with."""
    assert calibration([(scored([[1, 0, 0]], [("a",)]), [Case("x", ("a",))])]) is None


def test_a_fitted_router_has_every_figure(scorer, suite, cases):
    """Known and other adapters apart, pairs, wordings, prompts of nobody."""
    names = scorer.names
    some = replace(among(suite, names), new_words=[])
    found = measure_routing(some, scorer, names[:3])
    tops = [r["top"][0] for r in found["single"]["by_adapter"].values()]
    assert found["known_top1"] == pytest.approx(np.mean(tops[:3]), abs=1e-4)
    assert found["held_out_top1"] == pytest.approx(np.mean(tops[3:]), abs=1e-4)
    assert found["known_top1"] > 0.7
    assert found["roc"]["far"]["auroc"] > 0.7
    assert found["roc"]["far"]["prompts"] == len(suite.far)
    assert "new_words" not in found
    both = len(some.pairs_kept.both())
    exactly = sum(
        set(chosen) == set(case.adapters)
        for chosen, case in zip(
            scorer(texts(some.pairs_kept.both())).chosen, some.pairs_kept.both(), strict=True
        )
    )
    assert found["pairs"]["exactly"] == pytest.approx(exactly / both, abs=1e-4)
