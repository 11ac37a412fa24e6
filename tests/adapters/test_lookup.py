"""Whoever asks for a name that is not there is told the nearest, and nobody waits for that."""

from __future__ import annotations

import difflib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.lookup import nearest, unknown

NAMES = [f"customer-{i:05d}-translate-english-to-german-in-a-formal-tone" for i in range(1000)]


def compared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each pair of names that is compared from now on."""
    pairs: list[Any] = []

    class Watched(difflib.SequenceMatcher):  # type: ignore[type-arg]
        def set_seq1(self, a: Any) -> None:
            pairs.append(a)
            super().set_seq1(a)

    monkeypatch.setattr(difflib, "SequenceMatcher", Watched)
    return pairs


@pytest.mark.parametrize("count", [30, 1000, 10_000])
def test_few_are_compared_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Comparing a thousand takes 0.2 s, in which no other tenant's prompt is routed."""
    pairs = compared(monkeypatch)
    assert nearest(f"{'ab' * 29}-x", [f"{'ab' * 29}-{i:05d}" for i in range(count)])
    assert 3 <= len(pairs) <= 50


@pytest.mark.parametrize(
    "asked",
    [
        NAMES[421].replace("customer", "custmer"),
        NAMES[421].replace("formal", "fromal"),
        NAMES[421][1:],
        NAMES[421] + "s",
        NAMES[421].replace("00421", "0421"),
    ],
)
def test_the_nearest_of_many_is_found_wherever_the_slip_is(asked: str) -> None:
    assert nearest(asked, NAMES)[0] == NAMES[421]


def test_neighbours_are_found_among_more_names_than_are_looked_at() -> None:
    names = [f"adapter-{i:06d}" for i in range(20_000)]
    for i in (0, 9_999, 19_999):
        assert nearest(f"adapter-{i:06d}x", reversed(names))[0] == names[i]


@given(st.text("abc", max_size=8), st.lists(st.text("abc", max_size=8), max_size=20, unique=True))
def test_of_few_names_the_nearest_are_those_of_difflib(asked: str, names: list[str]) -> None:
    """The selection of the likely ones leaves nothing out then."""
    assert nearest(asked, names) == difflib.get_close_matches(asked, sorted(names), 3)


def test_a_long_name_is_not_compared_whole() -> None:
    assert str(unknown("task", "0" * 10**6, ["0" * 64])).count("0") < 1000
