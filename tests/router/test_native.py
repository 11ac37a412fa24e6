"""The compiled loops and numpy's: the same buckets to the bit, the same sums within rounding."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.router import counting as counting_module
from mora_serve.router import native
from mora_serve.router.arrays import unit
from mora_serve.router.counting import (
    Counting,
    count_features,
    features,
    sorted_words,
    without,
)
from mora_serve.router.int8 import to_int8
from mora_serve.router.key_search import KeyParts, Keys
from mora_serve.router.projection import Projection

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


def marked(text: str, seed: int) -> tuple[bytes, np.ndarray]:
    """A text as words apart by spaces, some of them in quotations."""
    rng = np.random.default_rng(seed)
    data = b" " + text.encode() + b" "
    return data, np.where(np.repeat(rng.random(len(data)) < 0.4, 3)[: len(data)], 0.3, 1.0)


@given(
    st.text("ab c\x80", max_size=40),
    st.sampled_from([0.0, 0.5, 1.7]),
    st.integers(2, 4),
    st.integers(0, 3),
    SEEDS,
)
def test_a_text_falls_into_the_same_buckets(
    text: str, pairs: float, least: int, more: int, seed: int
) -> None:
    """Whatever the text and its quotations; to the bit."""
    arguments = (*marked(text, seed), Counting(pairs, range(least, least + more + 1), 67))
    assert np.array_equal(count_features(*arguments), counting_module._count_features(*arguments))


@given(st.text("ab c\x80", max_size=40), st.lists(st.sampled_from("abc"), max_size=3), SEEDS)
def test_the_same_words_are_taken_out(text: str, known: list[str], seed: int) -> None:
    data, weight = marked(text, seed)
    words = sorted_words({zlib.crc32(word.encode()) for word in known})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        plain = without(data, weight, words)
    assert without(data, weight, words) == plain
    left = [
        w
        for w in re.finditer(rb"[^ ]+", data)
        if weight[w.start()] < 1 or w.group().decode("utf-8", "replace") not in known
    ]
    outside = any(weight[w.start()] == 1 for w in left)
    assert plain.split() == ([w.group() for w in left] if outside else [])


@pytest.mark.usefixtures("way")
def test_an_ngram_begins_and_ends_with_spaces_and_has_none_inside() -> None:
    """Of " ab c ": of 3 bytes " ab", "ab " and " c "; each weighs what its second byte does."""
    weight = np.array([1.0, 2, 4, 8, 16, 32])
    counts = count_features(b" ab c ", weight, Counting(0.0, range(3, 4), 10_007))
    words = count_features(b" ab c ", weight, Counting(0.0, range(3, 3), 10_007))
    assert sorted(words[words > 0]) == [2.0, 16.0]
    assert sorted((counts - words)[counts - words > 0]) == [2.0, 4.0, 16.0]


@pytest.mark.usefixtures("way")
def test_quoted_words_in_a_row_are_one_neighbour_and_the_ends_are_two() -> None:
    """Of " a 'b c' d ": start + a, a + quotation, quotation + d, d + end."""
    quoted, plain = np.ones(9), np.ones(9)
    quoted[3:6] = 0.5
    for weight, pairs in ((quoted, 4), (plain, 5)):
        counts = count_features(b" a b c d ", weight, Counting(2.0, range(3, 3), 10_007))
        assert (counts == 2.0).sum() == pairs


def keys(centres: np.ndarray, prototypes: np.ndarray) -> KeyParts:
    codes, scale = to_int8(centres)
    n, count, k = prototypes.shape
    own, scales = to_int8(prototypes.reshape(-1, k))
    return KeyParts(
        codes, own.reshape(n, count, k), np.column_stack((scale, scales.reshape(n, count)))
    )


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 100),
    count=st.integers(1, 3),
    seed=SEEDS,
    data=st.data(),
)
def test_scores_of_keys(n: int, k: int, count: int, seed: int, data: st.DataObject) -> None:
    """Near float64's, and to the bit whatever keys are beside."""
    rng = np.random.default_rng(seed)
    parts = keys(rng.standard_normal((n, k)), rng.standard_normal((n, count, k)))
    z = unit(rng.standard_normal(k).astype(np.float32))
    every = np.arange(n)
    cosines, nearest = Keys([parts]).scores(z, every)
    assert cosines.dtype == nearest.dtype == np.float32
    scales = parts.scales.astype(float)
    near = (parts.prototypes.astype(float) @ z) * scales[:, 1:]
    assert np.allclose(cosines, parts.centres.astype(float) @ z * scales[:, 0], atol=1e-3)
    assert np.allclose(nearest, near.max(1), atol=1e-3)
    cut = data.draw(st.integers(1, n))
    split = Keys(
        [
            p
            for p in (KeyParts(*(c[at] for c in parts)) for at in (slice(cut), slice(cut, n)))
            if len(p.centres)
        ]
    )
    at = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=6)), np.intp)
    assert np.array_equal(split.scores(z, at), (cosines[at], nearest[at]))
    assert np.array_equal(split.search(z, every, n), (every, cosines))
    i = data.draw(st.integers(0, n - 1))
    assert np.array_equal(split.prototypes(i), parts.prototypes[i] * parts.scales[i, 1:, None])


@pytest.mark.parametrize("way", ["compiled", "numpy"], indirect=True)
def test_a_search_finds_the_largest_and_all_that_equal_the_last(way: str) -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        n, count = int(rng.integers(1, 40)), int(rng.integers(1, 12))
        centres = rng.integers(-3, 4, (n, 1)).astype(np.float32) * np.ones((1, 40), np.float32)
        table = Keys([keys(centres, centres[:, None])])
        z = np.ones(20, np.float32)  # a part of each centre
        at = np.flatnonzero(rng.random(n) < 0.8)
        found, cosines = table.search(z, at, count)
        values = 20 * centres[at, 0]
        least = sorted(values)[-min(count, len(at))] if len(at) else 0
        assert found.tolist() == at[values >= least].tolist()
        assert np.allclose(cosines, values[values >= least], rtol=1e-5)


def projection(n: int, k: int, seed: int) -> tuple[Projection, np.ndarray, np.ndarray]:
    """A projection, what it multiplies by, and what it takes off."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-127, 128, (n, k)).astype(np.int8)
    scales, mean = rng.random(k).astype(np.float32), rng.random(n).astype(np.float32) / n
    return Projection(rows, scales, mean), rows * scales.astype(float), mean


@given(n=st.integers(1, 9), k=st.integers(2, 70), count=st.integers(0, 12), seed=SEEDS)
def test_features_are_embedded(n: int, k: int, count: int, seed: int) -> None:
    ours, matrix, mean = projection(n, k, seed)
    rng = np.random.default_rng(seed + 1)
    index, values = rng.integers(0, n, count), rng.standard_normal(count).astype(np.float32)
    got = ours.embed(index, values)
    assert got.dtype == np.float32
    if count:
        exact = values.astype(float) @ matrix[index] - mean.astype(float) @ matrix
        length = np.linalg.norm(exact)
        assert np.allclose(got * length, exact, rtol=0, atol=1e-4 * np.abs(matrix).max() * count)
    else:
        assert not got.any()


@pytest.mark.usefixtures("way")
def test_a_text_is_embedded_by_its_features() -> None:
    ours, _, _ = projection(67, 40, 0)
    counting = Counting(0.5, range(3, 6), 67)
    for text in ("turn 'it' around", "a", "", " "):
        data, weight = marked(text, 1)
        expected = ours.embed(*features(count_features(data, weight, counting)))
        assert np.allclose(ours.embed_text(data, weight, counting), expected, atol=1e-6)
        assert expected.any() == bool(text.strip())


@pytest.mark.parametrize("size", [1, 100, 512, 5000])
def test_either_way_gives_the_same_bits_of_keys(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest codes there are, all of one sign: no sum overflows."""
    rng = np.random.default_rng(size)
    codes = rng.integers(-127, 128, (40, 4, size)).astype(np.int8)
    codes[0], codes[1] = 127, -127
    parts = KeyParts(codes[:, 0], codes[:, 1:], rng.random((40, 4)).astype(np.float32))
    for z in (np.ones(size), -np.ones(size), rng.standard_normal(size), np.zeros(size)):
        query, at = z.astype(np.float32), np.array([3, 0, 1, 39])
        table = Keys([parts])
        compiled = (*table.scores(query, at), *table.search(query, at, 2))
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            plain = (*table.scores(query, at), *table.search(query, at, 2))
        assert all(map(np.array_equal, compiled, plain))
        exact = parts.centres[at].astype(float) @ query * parts.scales[at, 0].astype(float)
        assert np.allclose(plain[0], exact, rtol=0, atol=1e-3 * np.abs(exact).max() + 1e-6)


@pytest.mark.usefixtures("way")
def test_either_way_embeds_alike() -> None:
    """The property above is of the one in use; this is of both."""
    ours, matrix, mean = projection(9, 512, 0)
    index, values = np.array([3, 1, 0]), np.array([0.5, -2, 1], np.float32)
    exact = unit((values @ matrix[index] - mean @ matrix)[None])[0]
    assert np.allclose(ours.embed(index, values), exact, atol=1e-5)
    part = unit((values @ matrix[index] - mean[:4] @ matrix[:4])[None])[0]
    assert np.allclose(ours.part(4).embed(index, values), part, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_what_lies_past_the_rows_is_never_read() -> None:
    """A loop in C would go on; both ways refuse."""
    parts = keys(np.ones((2, 8)), np.ones((2, 1, 8)))
    table = Keys([parts, parts])
    z, at = np.ones(8, np.float32), np.array([3])
    with pytest.raises(ValueError, match="9 numbers for keys of 8"):
        table.search(np.ones(9, np.float32), at, 1)
    for short_or_long in (7, 9):
        with pytest.raises(ValueError, match="numbers for keys of 8"):
            table.scores(np.ones(short_or_long, np.float32), at)
    for past in (4, -1):
        with pytest.raises(IndexError):
            table.search(z, np.array([past]), 1)
        with pytest.raises(IndexError):
            table.scores(z, np.array([0, past]))
        with pytest.raises(IndexError):
            table.prototypes(past)
    ours, _, _ = projection(3, 4, 0)
    for index in (3, -1):
        with pytest.raises(IndexError):
            ours.embed(np.array([index]), np.ones(1, np.float32))


@pytest.mark.usefixtures("way")
def test_numbers_that_do_not_agree_are_refused() -> None:
    ours, _, _ = projection(3, 4, 0)
    counting = Counting(0.5, range(3, 6), 3)
    with pytest.raises(ValueError, match="50 buckets for 3 rows"):
        ours.embed_text(b" a b ", np.ones(5), counting._replace(dim=50))
    with pytest.raises(ValueError, match="3 indices of 1 features"):
        ours.embed(np.array([0, 1, 2]), np.ones(1, np.float32))
    for work in (
        lambda: ours.embed_text(b" a b ", np.ones(4), counting),
        lambda: without(b" a b ", np.ones(4), sorted_words(())),
        lambda: count_features(b" a b ", np.ones(4), counting),
    ):
        with pytest.raises(ValueError, match="4 weights of 5 bytes"):
            work()
    with pytest.raises(ValueError, match="n-grams of 1 bytes"):
        count_features(b" a ", np.ones(3), counting._replace(lengths=range(1, 3)))
    good, small = (
        keys(np.ones((2, 8)), np.ones((2, 2, 8))),
        keys(np.ones((2, 4)), np.ones((2, 2, 4))),
    )
    few = keys(np.ones((2, 8)), np.ones((2, 1, 8)))
    for other in (small, few, good._replace(scales=good.scales[:1])):
        with pytest.raises(ValueError, match="keys of shapes"):
            Keys([good, other])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-25, 1e-10, 1e4])
def test_a_projection_of_any_scale_gives_a_unit_vector_or_nothing(scale: float) -> None:
    """Never an infinite number, or none."""
    rows = np.random.default_rng(3).integers(-127, 128, (5, 40)).astype(np.int8)
    ours = Projection(rows, np.full(40, scale, np.float32), np.zeros(5, np.float32))
    z = ours.embed(np.array([1, 2]), np.array([0.6, 0.8], np.float32))
    assert np.linalg.norm(z) == pytest.approx(0.0 if scale < 1e-20 else 1.0, abs=1e-5)
    table = Keys([keys(np.ones((2, 40)), np.ones((2, 1, 40)))])
    tiny = np.full(40, 1e-42, np.float32)
    for query in (z, tiny):
        found, cosines = table.search(query, np.arange(2), 1)
        assert len(found) == 2
        assert np.isfinite(cosines).all()


@pytest.mark.usefixtures("way")
def test_parts_of_any_strides_are_read_as_they_are() -> None:
    parts = keys(np.arange(24.0).reshape(4, 6), np.arange(24.0).reshape(4, 1, 6))
    z = np.arange(6, dtype=np.float32)
    odd = KeyParts(*(np.repeat(c, 2, axis=0)[::2] for c in parts))
    at = np.arange(4)
    assert np.array_equal(Keys([odd]).scores(z, at), Keys([parts]).scores(z, at))


def test_a_library_of_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    native.library.cache_clear()
    monkeypatch.setattr(native, "VERSION", -1)
    try:
        assert native.library() is None
    finally:
        native.library.cache_clear()
