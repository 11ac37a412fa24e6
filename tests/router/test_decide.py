"""The decision rule: abstain, or the best and what goes with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.router.decide import REPORTED, decide
from mora_serve.router.evidence import Evidence
from mora_serve.router.format import Calibration, Gate
from mora_serve.router.gate import opened, probabilities

# Probabilities are σ(20 (x - 0.5)) of the first input of either gate.
CALIBRATION = Calibration(0.6, 0.25, Gate((20.0,), -10.0), Gate((20.0, 0.0), -10.0))


def seen(*rows: tuple[str, float, str]) -> Evidence:
    """From (name, what its gate goes by, group); the score is a tenth of the second."""
    values = np.array([r[1] for r in rows], np.float32)
    names, groups = (np.array([r[i] for r in rows], object) for i in (0, 2))
    further = np.column_stack((values[1:], np.ones(len(rows) - 1, np.float32)))
    return Evidence(names, groups, values / 10, values[:1], further)


def chosen(*rows: tuple[str, float, str], most: int = 4) -> tuple[str, ...]:
    return decide(seen(*rows), CALIBRATION, most).adapters


def test_it_abstains_below_the_threshold_and_still_reports() -> None:
    choice = decide(seen(("a", 0.51, ""), ("b", 0.9, "")), CALIBRATION, 2)
    assert choice.adapters == ()
    assert [c.adapter for c in choice.candidates] == ["a", "b"]
    assert chosen(("a", 0.53, "")) == ("a",)


def test_without_candidates_it_abstains() -> None:
    assert decide(None, CALIBRATION, 2) == ((), ())


def test_others_run_where_their_gate_is_open_as_many_as_allowed() -> None:
    rows = [("a", 0.9, ""), ("b", 0.6, ""), ("c", 0.49, ""), ("d", 0.7, "")]
    assert chosen(*rows) == ("a", "d", "b")
    assert chosen(*rows, most=2) == ("a", "d")
    assert chosen(*rows, most=1) == ("a",)


def test_one_adapter_of_a_group_runs() -> None:
    rows = [("a", 0.9, "g"), ("b", 0.9, "g"), ("c", 0.8, "h"), ("d", 0.7, ""), ("e", 0.7, "h")]
    assert chosen(*rows) == ("a", "c", "d")


def test_equal_probabilities_go_by_name() -> None:
    assert chosen(("c", 0.9, ""), ("b", 0.7, ""), ("a", 0.7, "")) == ("c", "a", "b")


def test_a_decision_reports_the_best_candidates() -> None:
    rows = [("best", 0.9, "")] + [(f"a{i:02}", i / 100, "") for i in range(40)]
    candidates = decide(seen(*rows), CALIBRATION, 2).candidates
    assert len(candidates) == REPORTED
    names = ["best"] + [f"a{i:02}" for i in range(39, 40 - REPORTED, -1)]
    assert [c.adapter for c in candidates] == names


values = st.floats(-1, 1, width=32)


@given(
    st.lists(st.tuples(values, st.sampled_from(["", "g", "h"])), min_size=1, max_size=30),
    st.integers(1, 20),
)
def test_a_decision_keeps_to_its_rules(rows: list, most: int) -> None:
    named = [(f"a{i}", *row) for i, row in enumerate(rows)]
    choice = decide(seen(*named), CALIBRATION, most)
    assert len(choice.adapters) <= most
    assert len(set(choice.adapters)) == len(choice.adapters)
    group_of = {name: group for name, _, group in named}
    groups = [g for name in choice.adapters if (g := group_of[name])]
    assert len(set(groups)) == len(groups)
    candidates = {c.adapter: c.probability for c in choice.candidates}
    assert all(candidates[name] > 0.5 for name in choice.adapters)
    order = [c.adapter for c in choice.candidates]
    assert order[0] == "a0"
    assert [n for n in order if n in choice.adapters] == list(choice.adapters)
    further = [c.probability for c in choice.candidates[1:]]
    assert further == sorted(further, reverse=True)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=5))
def test_a_probability_is_one_whatever_the_inputs(inputs: list[float]) -> None:
    rows = [(f"a{i}", x, "") for i, x in enumerate(inputs)]
    p = probabilities(seen(*rows), CALIBRATION)
    assert ((p >= 0) & (p <= 1)).all()


def test_a_gate_is_the_logistic_function_of_its_weighted_inputs() -> None:
    gate = Gate((2.0, -1.0), 0.5)
    p = opened(gate, np.array([[0.0, 0.5], [1.0, 0.0]], np.float32))
    assert p[0] == pytest.approx(0.5)
    assert p[1] == pytest.approx(1 / (1 + np.exp(-2.5)))
