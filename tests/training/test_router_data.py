"""What a router is fitted on: labels, mixtures made of single prompts, features."""

from __future__ import annotations

import numpy as np
import pytest

from mora_serve.errors import InvalidArgument
from mora_serve.router.features import Features, NGrams, PooledHidden
from router_training.router_data import FeatureTable, Labelled, RouterData, joined

EXAMPLES = {name: [f"{name} prompt {i}" for i in range(12)] for name in ("b", "a", "c")}
OUTSIDE = [f"something else {i}" for i in range(70)]


def test_prompts_are_sorted_and_counted_once() -> None:
    data = RouterData(
        [
            Labelled("two", ("b",)),
            Labelled("one", ("b",)),
            Labelled("two", ("b",)),
            Labelled("both", ("b", "a")),
            Labelled("both", ("a", "b")),
        ]
    )
    assert data.adapters == ("a", "b")
    assert data.singles() == {"a": [], "b": ["one", "two"]}
    assert data.mixtures() == [Labelled("both", ("a", "b"))]


def test_enough_data_pass() -> None:
    RouterData.of(EXAMPLES, OUTSIDE).check()
    RouterData.of(EXAMPLES, OUTSIDE[:30], OUTSIDE[30:]).check()


@pytest.mark.parametrize(
    ("examples", "outside", "field"),
    [
        ({"a": EXAMPLES["a"], "b": EXAMPLES["b"]}, OUTSIDE, "examples"),
        (EXAMPLES | {"a": ["x", "x"] * 9}, OUTSIDE, "examples.a"),
        (EXAMPLES, ["x"] * 100, "outside"),
    ],
)
def test_too_little_data_is_refused(examples: dict, outside: list, field: str) -> None:
    with pytest.raises(InvalidArgument) as e:
        RouterData.of(examples, outside).check()
    assert e.value.field == field


def test_joined_prompts_are_for_adapters_that_may_run_together() -> None:
    groups = {"a": "g", "b": "g"}
    made = joined(EXAMPLES, groups, 60, 0)
    assert len(made) == 60
    assert {frozenset(m.adapters) for m in made} == {frozenset("ac"), frozenset("bc")}
    for mixture in made:
        assert all(any(p in mixture.prompt for p in EXAMPLES[n]) for n in mixture.adapters)
    assert made == joined(EXAMPLES, groups, 60, 0) != joined(EXAMPLES, groups, 60, 1)
    assert joined(EXAMPLES, dict.fromkeys("abc", "g"), 60, 0) == []


def test_each_text_has_one_row_of_features_and_its_state() -> None:
    features = Features(NGrams(dim=64), PooledHidden(1, 3))

    def pool(texts):
        return np.array([[len(t), 1, 0] for t in texts], np.float32)

    table = FeatureTable.of(["b", "a", "b"], features, pool)
    assert table.texts == ["a", "b"]
    rows = table.where(["b", "a", "b"])
    assert (table.rows[rows] == features.dense(["b", "a", "b"], pool(["b", "a", "b"]))).all()
    assert (table.states(rows) == pool(["b", "a", "b"])).all()
    assert FeatureTable.of(["a"], Features(NGrams()), pool).states(rows[:0]) is None
    with pytest.raises(InvalidArgument):
        FeatureTable.of(["a"], features, None)
