"""The compiled loops and numpy's: the same buckets to the bit, the same sums within rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.router import native
from mora_serve.router.native import Stacked, count_ngrams, int8_products, weighted_sum

SEEDS = st.integers(0, 2**16)


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no compiler built the library")
    return str(request.param)


def test_the_library_is_built_where_the_cpu_path_is() -> None:
    """A version that the two sides do not agree on would go unseen, and numpy do the work."""
    from mora_serve.model.native.library import library

    assert (native.library() is None) == (library() is None)


@given(st.text("ab c\x80", max_size=40), st.integers(2, 4), st.integers(0, 3), SEEDS)
def test_ngrams_fall_into_the_same_buckets(text: str, least: int, more: int, seed: int) -> None:
    """Whatever the text, its weights and its words' hashes; to the bit."""
    rng = np.random.default_rng(seed)
    data = b" " + text.encode() + b" "
    hashes = rng.integers(0, 1 << 42, 5, np.uint64)
    weights, weight = rng.random(5), rng.random(len(data))
    arguments = (hashes, weights, data, weight, range(least, least + more + 1), 67)
    assert np.array_equal(count_ngrams(*arguments), native._count_ngrams(*arguments))


@pytest.mark.usefixtures("way")
def test_an_ngram_begins_and_ends_with_spaces_and_has_none_inside() -> None:
    """Of " ab c ": of 3 bytes " ab", "ab " and " c "; each weighs what its second byte does."""
    none = np.zeros(0)
    weight = np.array([1.0, 2, 4, 8, 16, 32])
    counts = count_ngrams(none.astype(np.uint64), none, b" ab c ", weight, range(3, 4), 10_007)
    assert sorted(counts[counts > 0]) == [2.0, 4.0, 16.0]


@given(n=st.integers(1, 9), k=st.integers(1, 100), seed=SEEDS, data=st.data())
def test_products_of_codes(n: int, k: int, seed: int, data: st.DataObject) -> None:
    """Near float64's, and to the bit whatever rows are beside; also of part of each row."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    z = rng.standard_normal(k).astype(np.float32)
    whole = int8_products(codes, z)
    assert whole.dtype == np.float32
    exact = codes.astype(float) @ z.astype(float)
    assert np.allclose(whole, exact, rtol=0, atol=1e-6 * 127 * np.abs(z).sum())
    cut = data.draw(st.integers(1, n))
    stacked = Stacked([p for p in (codes[:cut].copy(), codes[cut:].copy()) if len(p)])
    rows = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=6)), np.intp)
    assert np.array_equal(stacked.products(z), whole)
    assert np.array_equal(stacked.products(z, rows), whole[rows])
    part = data.draw(st.integers(1, k))
    assert np.array_equal(stacked.products(z[:part]), int8_products(codes[:, :part], z[:part]))


@given(n=st.integers(1, 9), k=st.integers(1, 70), count=st.integers(0, 12), seed=SEEDS)
def test_weighted_sums_of_rows(n: int, k: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, k)).astype(np.float32)
    index, values = rng.integers(0, n, count), rng.standard_normal(count).astype(np.float32)
    exact = values.astype(float) @ rows[index].astype(float)
    got = weighted_sum(rows, index, values)
    assert got.dtype == np.float32
    assert np.allclose(got, exact, rtol=0, atol=1e-6 * (1 + np.abs(values).sum() * 5))


@pytest.mark.usefixtures("way")
def test_either_way_gives_the_same_sums() -> None:
    """The properties above are of the one in use; this is of both."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (40, 512)).astype(np.int8)
    z = rng.standard_normal(512).astype(np.float32)
    rows = np.array([3, 1, 39])
    products = Stacked([codes]).products(z, rows)
    assert np.allclose(products, codes[rows].astype(float) @ z, rtol=0, atol=0.02)
    table = rng.standard_normal((9, 512)).astype(np.float32)
    assert np.allclose(weighted_sum(table, rows % 9, z[:3]), z[:3] @ table[rows % 9], atol=1e-4)


@pytest.mark.usefixtures("way")
def test_what_lies_past_the_rows_is_never_read() -> None:
    """A loop in C would go on; both ways refuse."""
    stacked = Stacked([np.ones((2, 8), np.int8), np.ones((1, 8), np.int8)])
    with pytest.raises(ValueError, match="9 numbers for rows of 8"):
        stacked.products(np.ones(9, np.float32))
    with pytest.raises(IndexError):
        stacked.products(np.ones(8, np.float32), np.array([3]))
    table, values = np.ones((3, 4), np.float32), np.ones(1, np.float32)
    for index in (3, -1):
        with pytest.raises(IndexError):
            weighted_sum(table, np.array([index]), values)


@pytest.mark.usefixtures("way")
def test_parts_of_any_strides_are_read_as_they_are() -> None:
    codes = np.arange(24, dtype=np.int8).reshape(4, 6)
    z = np.arange(1, 4, dtype=np.float32)
    got = Stacked([codes[:, ::2], codes[::2, 3:]]).products(z)
    want = np.concatenate([codes[:, ::2], codes[::2, 3:]]).astype(np.float32) @ z
    assert np.array_equal(got, want)


def test_a_library_of_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(native, "VERSION", -1)
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()
