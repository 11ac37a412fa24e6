"""Cases: kinds of prompts, fewer of them, names that must exist."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.errors import InvalidArgument
from router_training.evaluation.cases import Case, by_adapter, check_adapters, fewer

CASES = st.lists(
    st.builds(Case, st.text(max_size=4), st.lists(st.sampled_from("abc"), unique=True).map(tuple)),
    max_size=30,
)


@given(CASES)
def test_cases_are_grouped_by_all_their_adapters(cases):
    """Every case is in the group of its own set, and groups come in the order of their first."""
    groups = by_adapter(cases)
    assert sorted(i for at in groups.values() for i in at) == list(range(len(cases)))
    for names, at in groups.items():
        assert {cases[i].adapters for i in at} == {names}
    assert [at[0] for at in groups.values()] == sorted(at[0] for at in groups.values())


@given(CASES, st.integers(0, 5))
def test_fewer_cases_are_the_first_of_each_group(cases, count):
    """At most so many are left of each, in their order."""
    kept = fewer(cases, count)
    for names, at in by_adapter(cases).items():
        assert [c for c in kept if c.adapters == names] == [cases[i] for i in at[:count]]


def test_a_suite_of_fewer_prompts_is_a_part_of_it(suite):
    """Every kind of prompt is cut down alike, the prompts are the same ones."""
    few = suite.fewer(2)
    assert few.prompts == 2
    assert len(few.kept_templates) * 2 == len(suite.kept_templates)
    assert len(few.pairs_kept.both()) * 2 == len(suite.pairs_kept.both())
    assert len(few.near) * 2 == len(suite.near)
    assert set(few.reworded) <= set(suite.reworded)
    assert suite.fewer(99) == suite


def test_a_case_of_an_unknown_adapter_is_an_error():
    """The message names it and those that there are."""
    with pytest.raises(InvalidArgument, match=r"'c' is not an adapter.*a, b"):
        check_adapters([Case("x", ("a",)), Case("y", ("a", "c"))], ("a", "b"))
