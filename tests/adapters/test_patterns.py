"""PEFT's patterns match as in PEFT, and no pattern takes long."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.patterns import MAX_PATTERNS, Patterns
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import PROJECTIONS, projection_path

MODULES = [projection_path(layer, p) for layer in (0, 1, 12) for p in PROJECTIONS]

characters = st.sampled_from("qkvoprojlays0123456789_")
atoms = st.one_of(
    characters,
    st.sampled_from([".", r"\.", r"\d", r"\w", "[0-9]", "[^a-c]", "[]q]", "^", "$", "", "layers"]),
    st.sampled_from(["q_proj", "model", r"self_attn\.", "mlp."]),
)


def repeated(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    quantifier = st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,3}", "*?", "+?", "??", ""])
    group = inner.flatmap(lambda p: st.sampled_from([f"({p})", f"(?:{p})"]))
    return st.one_of(
        st.builds(str.__add__, group, quantifier),
        st.builds(str.__add__, characters, quantifier),
        st.builds(str.__add__, inner, inner),
        st.builds(lambda a, b: f"{a}|{b}", inner, inner),
    )


patterns = st.recursive(atoms, repeated, max_leaves=8)


def in_peft(pattern: str, module: str) -> bool:
    """The expression of PEFT's get_pattern_key."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


@given(patterns, st.sampled_from(MODULES))
def test_a_pattern_matches_the_modules_that_it_matches_in_peft(pattern: str, module: str) -> None:
    assert Patterns("alpha_pattern", {pattern: True}).get(module, False) == in_peft(pattern, module)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "self_attn.q_proj",
        "model.layers.0.self_attn.q_proj",
        r"^model\.layers\.0\..*",
        r"layers\.(0|12)\.self_attn\.(q|k|v)_proj",
        r".*\.mlp\.[a-z]+_proj",
        r"model\.layers\.1\d?\.mlp\.up_proj",
        "attn.q_proj",
        "proj",
    ],
)
def test_patterns_as_people_write_them(pattern: str) -> None:
    found = [m for m in MODULES if Patterns("rank_pattern", {pattern: True}).get(m, False)]
    assert found == [m for m in MODULES if in_peft(pattern, m)]


def test_the_first_pattern_that_matches_counts() -> None:
    patterns = Patterns("rank_pattern", {"up_proj": 1, "q_proj": 2, ".*q_proj": 3})
    assert patterns.get("model.layers.0.self_attn.q_proj", 9) == 2
    assert patterns.get("model.layers.0.self_attn.k_proj", 9) == 9


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(.*)*x", "(.|.)*x", "((.*)*)*x", "(a?){40}b", "(.*.*.*.*){99}x"]
)
def test_a_hostile_pattern_is_answered_or_refused_within_the_budget(pattern: str) -> None:
    """Each of these takes Python's own matcher exponential time."""
    patterns = Patterns("alpha_pattern", {pattern: True})
    with contextlib.suppress(InvalidArgument):
        assert not any(patterns.get(f"{m}{'a' * 200}", False) for m in MODULES)


def test_matching_stops_when_the_budget_is_spent() -> None:
    heavy = {f"{'(.*)*' * 90}x{i}": True for i in range(200)}
    patterns = Patterns("alpha_pattern", heavy)
    with pytest.raises(InvalidArgument, match="alpha_pattern: the patterns take too long"):
        any(patterns.get(m, False) for m in MODULES * 20)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", ")", "a)|(b", "[", "[a", "*a", "a**", "a*+", "a{3,1}", "a{", "{1}", "^*", "[z-a]"),
        *(r"(q)\1", r"\bq", "(?i)q", "(?=q)", "(?P<n>q)", "[[:alpha:]]", "[a&&b]", "\\", "a" * 513),
        "(" * 200 + "a" + ")" * 200 + "(?#)",
    ],
)
def test_what_is_not_understood_is_refused_by_name(pattern: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^rank_pattern: .*give the modules by name") as e:
        Patterns("rank_pattern", {pattern: 1})
    assert len(e.value.message) < 400


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="2049 patterns"):
        Patterns("rank_pattern", {f"m{i}": 1 for i in range(MAX_PATTERNS + 1)})
