"""Keys as points of a plane."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.router import key_map
from mora_serve.router.index import Index
from mora_serve.router.key_map import draw
from mora_serve.router.rows import Entry
from tests.router.make import key, vectors

KEYS = vectors(0, 40)
DIMS = KEYS.shape[1]


def entry(i: int) -> Entry:
    return Entry(f"a{i:02}", key(KEYS[i], KEYS[(i + 1) % 40]))


def index(rows: list[int], tenant: str = "default") -> Index:
    return Index.of((tenant, entry(i)) for i in rows)


@given(st.lists(st.integers(0, 39), min_size=1, max_size=20, unique=True))
def test_it_is_a_projection(rows: list[int]) -> None:
    """No two points are farther apart than their keys; two keys lie as far apart as they are."""
    drawn = draw(index(rows), "default", DIMS)
    assert sorted(drawn.names) == [f"a{i:02}" for i in sorted(rows)]
    at = dict(zip(drawn.names, drawn.points, strict=True))
    for i in rows:
        for j in rows:
            near = float(np.linalg.norm(at[f"a{i:02}"] - at[f"a{j:02}"]))
            far = float(np.linalg.norm(KEYS[i] - KEYS[j]))
            assert near <= far + 0.05  # keys are kept in 8 bits
            if len(rows) == 2:
                assert near == pytest.approx(far, abs=0.05)
    assert 0 <= drawn.share <= 1 + 1e-6


@given(st.permutations(list(range(12))))
def test_the_same_keys_give_the_same_picture(rows: list[int]) -> None:
    def places(rows: list[int]) -> np.ndarray:
        drawn = draw(index(rows), "default", DIMS)
        return np.array([p for _, p in sorted(zip(drawn.names, drawn.points, strict=True))])

    assert np.allclose(places(rows), places(list(range(12))), atol=1e-3)


def test_a_text_that_is_a_key_lies_where_the_key_does() -> None:
    drawn = draw(index(list(range(9))), "default", DIMS, KEYS[4])
    assert drawn.text == pytest.approx(drawn.points[drawn.names.index("a04")], abs=0.02)
    # its examples too: a key's first prototype is its own
    assert drawn.prototypes[drawn.names.index("a04")].shape[1] == 2


def test_other_tenants_keys_are_not_drawn() -> None:
    both = index([1, 2]).put("other", entry(3)).put("shared", entry(5))
    assert draw(both, "default", DIMS).names == ["a01", "a02", "a05"]
    assert draw(both, "default", DIMS, hidden={"a05"}).names == ["a01", "a02"]
    nobody = draw(index([1]), "nobody", DIMS, KEYS[1])
    assert (nobody.names, nobody.share, len(nobody.points)) == ([], 0.0, 0)


def test_of_very_many_the_nearest_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_map, "MOST", 5)
    all_of_them = index(list(range(40)))
    assert len(draw(all_of_them, "default", DIMS).names) == 5
    assert "a33" in draw(all_of_them, "default", DIMS, KEYS[33]).names
