"""The decision rule: abstain, or the best and what goes with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.router.decide import REPORTED, decide, gate
from mora_serve.router.format import Calibration
from mora_serve.router.index import Scores

CALIBRATION = Calibration(threshold=3.0, gate_position=0.4, gate_width=0.05, coherence=0.3)


def scores(*rows: tuple[str, float, float, str]) -> Scores:
    """From (name, cosine, relative, group); normed is 10 times the cosine."""
    cosine = np.array([r[1] for r in rows], np.float32)
    relative = np.array([r[2] for r in rows], np.float32)
    names, groups = (np.array([r[i] for r in rows], object) for i in (0, 3))
    return Scores(names, groups, cosine, 10 * cosine, relative)


def chosen(*rows: tuple[str, float, float, str], most: int = 4) -> tuple[str, ...]:
    return decide(scores(*rows), CALIBRATION, most).adapters


def test_it_abstains_below_the_threshold_and_still_reports() -> None:
    choice = decide(scores(("a", 0.29, 0.9, ""), ("b", 0.1, 0.1, "")), CALIBRATION, 2)
    assert choice.adapters == ()
    assert [c.adapter for c in choice.candidates] == ["a", "b"]
    assert chosen(("a", 0.31, 0.9, "")) == ("a",)


def test_without_candidates_it_abstains() -> None:
    assert decide(scores(), CALIBRATION, 2) == ((), ())


def test_the_best_cosine_runs_even_where_its_gate_is_shut() -> None:
    assert chosen(("a", 0.5, 0.1, ""), ("b", 0.4, 0.1, "")) == ("a",)


def test_others_run_where_their_gate_is_open_as_many_as_allowed() -> None:
    rows = [("a", 0.9, 0.9, ""), ("b", 0.8, 0.9, ""), ("c", 0.7, 0.39, ""), ("d", 0.6, 0.41, "")]
    assert chosen(*rows) == ("a", "b", "d")
    assert chosen(*rows, most=2) == ("a", "b")
    assert chosen(*rows, most=1) == ("a",)


def test_one_adapter_of_a_group_runs() -> None:
    rows = [("a", 0.9, 0.9, "g"), ("b", 0.89, 0.9, "g"), ("c", 0.8, 0.9, "h"), ("d", 0.7, 0.9, "")]
    assert chosen(*rows) == ("a", "c", "d")


def test_equal_cosines_go_by_name() -> None:
    assert chosen(("b", 0.9, 0.1, ""), ("a", 0.9, 0.1, "")) == ("a",)


def test_a_decision_reports_the_best_candidates() -> None:
    rows = [(f"a{i:02}", i / 100, 0.1, "") for i in range(40)]
    candidates = decide(scores(*rows), CALIBRATION, 2).candidates
    assert len(candidates) == REPORTED
    assert [c.adapter for c in candidates] == [f"a{i:02}" for i in range(39, 39 - REPORTED, -1)]


values = st.floats(-1, 1, width=32)


@given(
    st.lists(st.tuples(values, values, st.sampled_from(["", "g", "h"])), max_size=30),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_a_decision_is_one_function_of_the_set_of_scores(rows: list, most: int, rng) -> None:
    named = [(f"a{i}", *row) for i, row in enumerate(rows)]
    choice = decide(scores(*named), CALIBRATION, most)
    rng.shuffle(named)
    assert decide(scores(*named), CALIBRATION, most) == choice
    assert len(choice.adapters) <= most
    assert len(set(choice.adapters)) == len(choice.adapters)
    group_of = {name: group for name, _, _, group in named}
    groups = [g for name in choice.adapters if (g := group_of[name])]
    assert len(set(groups)) == len(groups)
    order = [c.adapter for c in choice.candidates]
    assert [n for n in order if n in choice.adapters] == list(choice.adapters)
    assert [c.score for c in choice.candidates] == sorted(
        (c.score for c in choice.candidates), reverse=True
    )


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_a_probability_is_one_whatever_the_score(relative: float) -> None:
    p = gate(np.array([relative], np.float32), CALIBRATION)[0]
    assert 0.0 <= p <= 1.0


def test_the_gate_is_half_open_at_its_position() -> None:
    p = gate(np.array([0.4, 0.5, 0.3], np.float32), CALIBRATION)
    assert p[0] == pytest.approx(0.5, abs=1e-5)
    assert p[1] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-5)
    assert p[1] + p[2] == pytest.approx(1.0, abs=1e-5)
