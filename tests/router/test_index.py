"""The index: changes touch one adapter, and nobody sees another tenant's keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.router import index as index_module
from mora_serve.router.index import Entry, Index, Scores
from tests.router.make import key, vectors

KEYS = vectors(0, 40)
PROMPT = vectors(1, 1)[0]

names = st.sampled_from([f"a{i}" for i in range(6)])
tenants = st.sampled_from(["default", "other", "third"])
changes = st.lists(st.tuples(st.booleans(), tenants, names, st.integers(0, 39)), max_size=25)


def entry(name: str, row: int, **options: object) -> Entry:
    return Entry(name, key(KEYS[row]), **options)  # type: ignore[arg-type]


def by_name(scores: Scores) -> dict[str, tuple[bytes, bytes, bytes]]:
    """Scores as bits."""
    columns = zip(scores.cosine, scores.normed, scores.relative, strict=True)
    values = (tuple(x.tobytes() for x in row) for row in columns)
    return dict(zip(scores.names, values, strict=True))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK", 3)


@given(changes)
def test_any_history_gives_the_adapters_that_it_leaves(history: list) -> None:
    index, expected = Index(), {}
    for put, tenant, name, row in history:
        if put:
            index = index.put(tenant, entry(name, row))
            expected[tenant, name] = row
        else:
            index = index.remove(tenant, name)
            expected.pop((tenant, name), None)
    assert len(index) == len(expected)
    for tenant in ("default", "other", "third"):
        scores = by_name(index.score(tenant, PROMPT))
        assert set(scores) == {n for t, n in expected if t == tenant}
    fresh = Index.of((t, entry(n, row)) for (t, n), row in expected.items())
    for tenant in ("default", "other", "third"):
        assert by_name(fresh.score(tenant, PROMPT)) == by_name(index.score(tenant, PROMPT))


@given(st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_another_adapter_changes_no_score_by_a_bit(others: int, seed: int) -> None:
    prompt = vectors(seed, 1)[0]
    alone = by_name(Index().put("default", entry("one", 0)).score("default", prompt))
    index = Index.of(("default", entry(f"x{i}", i)) for i in range(others))
    index = index.put("default", entry("one", 0)).put("default", entry("last", 39))
    assert by_name(index.score("default", prompt))["one"] == alone["one"]


@settings(max_examples=20)
@given(st.lists(names, max_size=4), st.lists(tenants, min_size=1, max_size=8))
def test_masks_are_respected(asked: list[str], owners: list[str]) -> None:
    index = Index.of((t, entry(f"a{i}", i)) for i, t in enumerate(owners))
    for tenant in set(owners):
        own = {f"a{i}" for i, t in enumerate(owners) if t == tenant}
        assert set(index.score(tenant, PROMPT).names) == own
        assert set(index.score(tenant, PROMPT, asked).names) == own & set(asked)
    assert not len(index.score("nobody", PROMPT).names)


def test_an_adapter_that_is_not_listed_is_seen_only_by_name() -> None:
    index = Index().put("default", entry("shy", 0, listed=False)).put("default", entry("a", 1))
    assert list(index.score("default", PROMPT).names) == ["a"]
    assert set(index.score("default", PROMPT, ["shy", "a"]).names) == {"shy", "a"}


def test_an_older_index_stays_as_it_was() -> None:
    old = Index().put("default", entry("a", 0))
    before = by_name(old.score("default", PROMPT))
    old.put("default", entry("a", 5)).put("default", entry("b", 6)).remove("default", "a")
    assert by_name(old.score("default", PROMPT)) == before


def test_a_removal_of_nothing_gives_the_same_index() -> None:
    index = Index().put("default", entry("a", 0))
    assert index.remove("default", "b") is index
    assert index.remove("other", "a") is index
    assert ("default", "a") in index
    assert ("other", "a") not in index


def test_scores_are_cosine_impostor_norm_and_place_between_impostor_and_own() -> None:
    index = Index().put("default", entry("a", 0, group="g"))
    scores = index.score("default", KEYS[0])
    assert list(scores.groups) == ["g"]
    cosine = scores.cosine[0]
    assert cosine == pytest.approx(1.0, abs=5e-3)  # keys have 8 bits
    assert scores.normed[0] == pytest.approx((cosine - 0.01) / 0.0625, rel=1e-5)
    assert scores.relative[0] == pytest.approx((cosine - 0.01) / (0.6 - 0.01), rel=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_keys_in_eight_bits_score_as_the_keys_do(seed: int) -> None:
    keys, prompt = vectors(seed, 8), vectors(seed + 1, 1)[0]
    index = Index.of(("default", Entry(f"a{i}", key(k))) for i, k in enumerate(keys))
    scores = index.score("default", prompt)
    found = dict(zip(scores.names, scores.cosine, strict=True))
    assert np.allclose([found[f"a{i}"] for i in range(8)], keys @ prompt, atol=3e-3)


def test_ten_thousand_adapters_take_less_than_ten_megabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    prototype = vectors(0, 1, 512)[0]
    index = Index.of(("default", Entry(f"a{i}", key(prototype))) for i in range(10_000))
    assert index.nbytes < 6e6
    scores = index.score("default", vectors(1, 1, 512)[0])
    assert len(scores.names) == 10_000
    assert np.ptp(scores.cosine) == 0
