"""The index: changes touch one adapter, and nobody sees another tenant's keys."""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.core import SHARED_TENANT
from mora_serve.router import index as index_module
from mora_serve.router.arrays import Floats, unit
from mora_serve.router.index import Index
from mora_serve.router.rows import Entry
from tests.router.make import key, vectors

KEYS = vectors(0, 40)
PROMPT = vectors(1, 1)[0]

names = st.sampled_from([f"a{i}" for i in range(6)])
tenants = st.sampled_from(["default", "other", "third"])
changes = st.lists(st.tuples(st.booleans(), tenants, names, st.integers(0, 39)), max_size=25)


def entry(name: str, row: int, **options: object) -> Entry:
    return Entry(name, key(KEYS[row], KEYS[(row + 1) % 40]), **options)  # type: ignore[arg-type]


def found(index: Index, tenant: str, z: Floats, asked=None, count: int = 100) -> dict[str, tuple]:
    """What each candidate scores, as bits."""
    rows = index.candidates(tenant, z, asked, count)
    if rows is None:
        return {}
    columns = zip(*rows.scores(z), strict=True)
    values = (tuple(x.tobytes() for x in row) for row in columns)
    return dict(zip(rows.names, values, strict=True))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK", 3)


def test_the_adapters_that_can_be_picked_unasked_are_counted() -> None:
    index = Index.of(("default", entry(f"a{i}", i, listed=i % 3 > 0)) for i in range(8))
    index = index.put("other", entry("b", 1))
    assert [index.listed(t) for t in ("default", "other", "third")] == [5, 1, 0]
    assert index.remove("default", "a1").listed("default") == 4


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
        scores = found(index, tenant, PROMPT)
        assert set(scores) == {n for t, n in expected if t == tenant}
    fresh = Index.of((t, entry(n, row)) for (t, n), row in expected.items())
    for tenant in ("default", "other", "third"):
        assert found(fresh, tenant, PROMPT) == found(index, tenant, PROMPT)


@given(st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_another_adapter_changes_no_score_by_a_bit(others: int, seed: int) -> None:
    prompt = vectors(seed, 1)[0]
    alone = found(Index().put("default", entry("one", 0)), "default", prompt)
    index = Index.of(("default", entry(f"x{i}", i)) for i in range(others))
    index = index.put("default", entry("one", 0)).put("default", entry("last", 39))
    assert found(index, "default", prompt)["one"] == alone["one"]


@settings(max_examples=20)
@given(st.lists(names, max_size=4), st.lists(tenants, min_size=1, max_size=8))
def test_masks_are_respected(asked: list[str], owners: list[str]) -> None:
    index = Index.of((t, entry(f"a{i}", i)) for i, t in enumerate(owners))
    for tenant in set(owners):
        own = {f"a{i}" for i, t in enumerate(owners) if t == tenant}
        assert set(found(index, tenant, PROMPT)) == own
        assert set(found(index, tenant, PROMPT, asked)) == own & set(asked)
    assert index.candidates("nobody", PROMPT) is None


def test_an_adapter_that_is_not_listed_is_seen_only_by_name() -> None:
    index = Index().put("default", entry("shy", 0, listed=False)).put("default", entry("a", 1))
    assert list(found(index, "default", PROMPT)) == ["a"]
    assert set(found(index, "default", PROMPT, ["shy", "a"])) == {"shy", "a"}


def test_an_older_index_stays_as_it_was() -> None:
    old = Index().put("default", entry("a", 0))
    before = found(old, "default", PROMPT)
    old.put("default", entry("a", 5)).put("default", entry("b", 6)).remove("default", "a")
    assert found(old, "default", PROMPT) == before


def test_a_removal_of_nothing_gives_the_same_index() -> None:
    index = Index().put("default", entry("a", 0))
    assert index.remove("default", "b") is index
    assert index.remove("other", "a") is index
    assert ("default", "a") in index
    assert ("other", "a") not in index


def test_a_score_is_the_cosine_with_the_centre_and_with_the_nearest_prototype() -> None:
    rows = Index().put("default", entry("a", 0, group="g")).candidates("default", KEYS[1])
    assert rows is not None
    assert list(rows.groups) == ["g"]
    cosine, nearest = rows.scores(KEYS[1])
    assert cosine[0] == pytest.approx(KEYS[0] @ KEYS[1], abs=5e-3)  # 8 bits
    assert nearest[0] == pytest.approx(1.0, abs=5e-3)


@given(st.integers(0, 2**32 - 1))
def test_keys_in_eight_bits_score_as_the_keys_do(seed: int) -> None:
    keys, prompt = vectors(seed, 8), vectors(seed + 1, 1)[0]
    index = Index.of(("default", Entry(f"a{i}", key(k))) for i, k in enumerate(keys))
    rows = index.candidates("default", prompt)
    assert rows is not None
    cosines = dict(zip(rows.names, rows.scores(prompt)[0], strict=True))
    assert np.allclose([cosines[f"a{i}"] for i in range(8)], keys @ prompt, atol=3e-3)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_candidates_are_the_nearest_centres(seed: int, count: int) -> None:
    keys, prompt = vectors(seed, 30), vectors(seed + 1, 1)[0]
    index = Index.of(("default", Entry(f"a{i:02}", key(k))) for i, k in enumerate(keys))
    every = index.candidates("default", prompt, count=30)
    rows = index.candidates("default", prompt, count=count)
    assert every is not None
    assert rows is not None
    ranked = sorted(zip(-every.scores(prompt)[0], every.names, strict=True))
    assert set(rows.names) == {name for _, name in ranked[:count]}


def test_equal_centres_go_by_name() -> None:
    index = Index.of(("default", entry(name, 0)) for name in ("d", "b", "a", "c"))
    assert set(found(index, "default", PROMPT, count=2)) == {"a", "b"}
    assert set(found(index, "default", PROMPT, ["c", "d"], count=1)) == {"c"}


def test_a_search_of_many_finds_whoever_a_part_of_the_centre_speaks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(index_module, "MANY", 25)
    monkeypatch.setattr(index_module, "LIKELY", 20)
    monkeypatch.setattr(index_module, "COARSE", 64)
    others = vectors(5, 400)
    index = Index.of(("default", Entry(f"x{i}", key(k))) for i, k in enumerate(others))
    right = 0
    for i in range(20):
        own = unit(others[i] + 0.8 * vectors(100 + i, 1)[0])
        right += f"x{i}" in found(index, "default", own, count=1)
        named = found(index, "default", own, [f"x{j}" for j in range(i + 30)], count=1)
        assert set(named) == set(found(index, "default", own, count=1))
    assert right == 20


def test_ten_thousand_adapters_take_less_than_thirty_megabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    same = key(*vectors(0, 4, 512))
    index = Index.of(("default", Entry(f"a{i}", same)) for i in range(10_000))
    assert index.nbytes < 30e6
    rows = index.candidates("default", vectors(1, 1, 512)[0])
    assert rows is not None
    assert sorted(rows.names) == sorted(f"a{i}" for i in range(10_000))[: index_module.FOUND]


@given(st.dictionaries(names, st.integers(0, 39)), st.dictionaries(names, st.integers(0, 39)))
def test_shared_adapters_count_as_the_tenants_own_unless_their_name_is_taken(
    own: dict[str, int], shared: dict[str, int]
) -> None:
    index = Index.of(
        [("one", entry(name, row)) for name, row in own.items()]
        + [(SHARED_TENANT, entry(name, row)) for name, row in shared.items()]
        + [("two", entry("theirs", 7))]
    )
    alone = Index.of(("one", entry(name, row)) for name, row in {**shared, **own}.items())
    assert index.listed("one", own.keys()) == alone.listed("one") == len(shared | own)
    for count in (3, 100):
        ours, theirs = (
            i.candidates("one", PROMPT, None, count, hidden=own.keys()) for i in (index, alone)
        )
        if theirs is None:
            assert ours is None
            continue
        assert ours is not None
        assert sorted(ours.names) == sorted(theirs.names)
        assert [ours.prototypes(i).tobytes() for i in map(ours.names.index, theirs.names)] == [
            theirs.prototypes(i).tobytes() for i in range(len(theirs.names))
        ]
    assert found_with(index, own.keys()) == found(alone, "one", PROMPT)


def found_with(index: Index, hidden: Set[str]) -> dict[str, tuple]:
    rows = index.candidates("one", PROMPT, hidden=hidden, count=100)
    if rows is None:
        return {}
    values = (tuple(x.tobytes() for x in row) for row in zip(*rows.scores(PROMPT), strict=True))
    return dict(zip(rows.names, values, strict=True))


def test_candidates_of_both_kinds_are_joined_once() -> None:
    index = Index.of(
        [("one", entry(f"a{i}", i)) for i in range(4)]
        + [(SHARED_TENANT, entry(f"s{i}", i + 10)) for i in range(4)]
    )
    some = index.candidates("one", PROMPT, ["a1", "s2"])
    assert some is not None
    both = some.joined(index.candidates("one", PROMPT, ["a1", "a3", "s0"]))
    assert sorted(both.names) == ["a1", "a3", "s0", "s2"]
    only = index.candidates("one", PROMPT, ["s3"])
    assert only is not None
    assert sorted(only.joined(some).names) == ["a1", "s2", "s3"]
