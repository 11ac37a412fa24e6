"""How the demo judges what came back."""

from __future__ import annotations

import pytest

from mora_serve.core import AdapterWeight, Decision, Mixture, Source
from mora_serve.demo.bundle import Example, Kind
from mora_serve.demo.scenes import judge

ROUTED = Example("auto", "reverse 'abc'", adapter="reverse", answer="cba")


def decision(source: Source = Source.ROUTER, **weights: float) -> Decision:
    return Decision(Mixture(tuple(AdapterWeight(a, w) for a, w in weights.items())), source)


def test_the_right_adapter_and_answer_are_as_they_should_be() -> None:
    assert judge(ROUTED, decision(reverse=1.0), "cba") == ""


@pytest.mark.parametrize(
    ("made", "text", "problem"),
    [
        (decision(reverse=1.0), "cab", "the right answer is 'cba'"),
        (decision(reverse=1.0), " cba", "the right answer is 'cba'"),
        (decision(double=1.0), "cba", "double answered, not reverse"),
        (decision(reverse=0.5), "cba", "0.5·reverse answered, not reverse"),
        (decision(reverse=1.0, json=1.0), "cba", "reverse + json answered, not reverse"),
        (decision(), "cba", "base answered, not reverse"),
        (decision(Source.ABSTAINED), "cba", "chosen by abstained, not by router"),
        (decision(Source.TASK, reverse=1.0), "cba", "chosen by task, not by router"),
    ],
)
def test_anything_else_is_a_problem_that_says_what_was_expected(
    made: Decision, text: str, problem: str
) -> None:
    assert judge(ROUTED, made, text) == problem


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("chat", Source.ROUTER),
        ("late", Source.ROUTER),
        ("task", Source.TASK),
    ],
)
def test_each_way_of_asking_has_its_own_chooser(kind: Kind, source: Source) -> None:
    example = Example(kind, "x", adapter="reverse")
    for other in Source:
        problem = judge(example, decision(other, reverse=1.0), "anything")
        assert (problem == "") == (other is source)


def test_without_adapters_nothing_may_have_run() -> None:
    for kind, source in (("base", Source.BASE), ("abstain", Source.ABSTAINED)):
        example = Example(kind, "x")  # type: ignore[arg-type]
        assert judge(example, decision(source), "anything") == ""
        assert judge(example, decision(source, reverse=1.0), "anything") != ""


def test_a_mixture_has_to_run_with_its_weights() -> None:
    example = Example("mixture", "x", mixture={"reverse": 1.0, "json": -0.1})
    assert judge(example, decision(Source.EXPLICIT, reverse=1.0, json=-0.1), "") == ""
    assert judge(example, decision(Source.EXPLICIT, reverse=1.0, json=0.1), "") != ""
    assert judge(example, decision(Source.EXPLICIT, reverse=1.0), "") != ""
