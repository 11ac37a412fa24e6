"""Prompt features: what they see of a text, and what a router file may say of them."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.errors import InvalidArgument
from mora_serve.router import counting
from mora_serve.router.counting import sorted_words
from mora_serve.router.features import Features, NGrams, PooledHidden, features_from

FEATURES = NGrams()


def dense(text: str) -> np.ndarray:
    return FEATURES.dense([text])[0]


@given(st.text(max_size=300))
def test_any_text_gives_distinct_sorted_indices_and_a_unit_vector_or_nothing(text: str) -> None:
    index, values = FEATURES.sparse(text)
    assert len(index) == len(values)
    assert (np.diff(index) > 0).all()
    assert ((index >= 0) & (index < FEATURES.dim)).all()
    assert (values > 0).all()
    if len(index):
        assert np.linalg.norm(values) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("text", ["", "   ", "?!", "''", "\n\t"])
def test_a_text_without_a_letter_or_digit_has_no_features(text: str) -> None:
    assert not len(FEATURES.sparse(text)[0])


def test_capitals_spacing_and_punctuation_change_nothing() -> None:
    assert (dense("Reverse the word, please") == dense("reverse  the word please!")).all()


def test_words_that_share_letters_are_nearer_than_others() -> None:
    a, b, c = dense("capitalise"), dense("capitalised"), dense("hyphenate")
    assert a @ b > 0.5 > a @ c


def test_order_counts_little_and_words_much() -> None:
    assert 0.8 < dense("swap the ends") @ dense("the ends swap") < 1.0
    without = NGrams(pairs=0.0).dense(["swap the ends", "the ends swap"])
    assert without[0] @ without[1] == pytest.approx(1.0, abs=1e-5)


def test_neighbouring_words_tell_texts_of_the_same_words_apart() -> None:
    one, like, other = dense("what is left of it"), dense("is left of it"), dense("of it is left")
    assert one @ like > one @ other


def test_a_quotation_is_one_neighbour_whatever_it_says() -> None:
    hashes = NGrams(dim=1 << 16, quoted=1e-6)
    shared = [set(hashes.sparse(f"turn {x} around")[0]) for x in ("'kavo'", "'blue moon'")]
    alone = [set(hashes.sparse(text)[0]) for text in ("turn", "around")]
    assert len((shared[0] & shared[1]) - alone[0] - alone[1]) >= 2  # turn + quotation + around


@given(st.lists(st.sampled_from(["turn", "it", "around", "'kavo it'", "please"]), max_size=8))
def test_a_text_without_some_words_is_the_text_that_the_others_make(words: list[str]) -> None:
    left = [w for w in words if w not in ("turn", "it")]
    read = FEATURES.read(" ".join(words), sorted_words(FEATURES.words("turn it")))
    index, values = counting.features(counting.count_features(*read, FEATURES.counting))
    if any(not w.startswith("'") for w in left):
        expected = FEATURES.sparse(" ".join(left))
        assert index.tolist() == expected[0].tolist()
        assert np.allclose(values, expected[1], atol=1e-6)
    else:
        assert not len(index)


def test_words_are_those_outside_quotations_in_order() -> None:
    words = FEATURES.words
    assert words("Turn 'kavo it' around, PLEASE") == words("turn around please")
    assert words("around turn") == words("turn around")[::-1]
    assert words("'kavo'") == words("") == []


def test_a_quoted_span_weighs_less_than_the_instruction() -> None:
    plain, quoted = dense("reverse kavoja"), dense("reverse 'kavoja'")
    data, instruction = dense("kavoja"), dense("reverse")
    assert quoted @ data < plain @ data
    assert quoted @ instruction > plain @ instruction


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("it's what one doesn't say", "its what one doesnt say"),
        ("the dogs' bone", "the dogs bone"),
        ("an unclosed 'quote and more", "an unclosed quote and more"),
    ],
)
def test_an_apostrophe_is_not_a_quotation(text: str, same: str) -> None:
    weights = FEATURES.sparse(text)[1]
    assert weights.max() / weights.min() < 3  # a quoted word would weigh 0.38 of a plain one
    assert dense(text) @ dense(same) > 0.6


@pytest.mark.parametrize("quoted", ["'a b'", '"a b"', "`a b`", "```a b```"])
def test_each_kind_of_quote_is_seen(quoted: str) -> None:
    assert dense(f"reverse {quoted}") @ dense("reverse") > dense("reverse a b") @ dense("reverse")


def test_a_long_prompt_counts_by_its_ends() -> None:
    middle = "lorem ipsum dolor " * 2000
    text = f"reverse the order {middle} as a json object"
    assert (dense(text) == dense(text.replace(middle, middle + middle))).all()
    assert dense(text) @ dense("reverse") > dense(middle) @ dense("reverse")


def test_the_hash_is_the_same_in_another_process() -> None:
    code = (
        "from mora_serve.router.features import NGrams;"
        "i, v = NGrams().sparse('Spell \\'kavo\\' größer'); print(i.tolist(), v.tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    index, values = FEATURES.sparse("Spell 'kavo' größer")
    assert out.stdout.strip() == f"{index.tolist()} {values.tolist()}"


def test_the_hash_is_that_of_version_2() -> None:
    """Files fitted on these features must mean the same for as long as the version stands."""
    index, _ = FEATURES.sparse("spell")
    assert index.tolist() == [
        *(46, 126, 355, 789, 792, 868, 977, 1002),
        *(1227, 1240, 1636, 1683, 1766, 1970, 1971),
    ]


def reference(text: str) -> set[int]:
    """The buckets of an ASCII text without quotes, by the definition and slowly."""
    words = re.findall("[0-9a-z]+", text.lower())
    hashes = [zlib.crc32(word.encode()) for word in words]
    line = [1 << 41, *hashes, 1 << 41] if words else []
    hashes += [(a * 0x9E3779B97F4A7C15 + b) % 2**64 for a, b in itertools.pairwise(line)]
    for word in words:
        padded = f" {word} ".encode()
        for n in (3, 4, 5):
            for i in range(len(padded) - n + 1):
                value = 0
                for c in padded[i : i + n]:
                    value = (value * 0x9E3779B97F4A7C15 + c) % 2**64
                hashes.append((value + n) % 2**64)
    found = set()
    for value in hashes:
        mixed = (value ^ (value >> 31)) * 0xBF58476D1CE4E5B9 % 2**64
        found.add((mixed >> 33) % FEATURES.dim)
    return found


@given(st.text("abcdeXYZ019 ,.?-", max_size=60))
def test_features_are_the_hashed_words_their_n_grams_and_pairs(text: str) -> None:
    assert set(FEATURES.sparse(text)[0].tolist()) == reference(text)


def test_a_description_reads_back() -> None:
    features = NGrams(dim=512, shortest=2, longest=4, max_bytes=100, quoted=0.5, pairs=2.0)
    assert features_from(features.describe()) == Features(features)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": ["ngrams"]}, "router.features"),
        ({"kind": "wavelets"}, "router.features"),
        ({"version": 1}, "router.features"),
        ({"version": 3}, "router.features"),
        ({"dim": 0}, "router.features.dim"),
        ({"dim": 1 << 40}, "router.features.dim"),
        ({"dim": True}, "router.features.dim"),
        ({"shortest": 1}, "router.features.shortest"),
        ({"longest": 2}, "router.features.longest"),
        ({"max_bytes": "many"}, "router.features.max_bytes"),
        ({"quoted": 0.0}, "router.features.quoted"),
        ({"quoted": 1}, "router.features.quoted"),
        ({"pairs": -0.1}, "router.features.pairs"),
        ({"pairs": 1e9}, "router.features.pairs"),
        ({"pairs": None}, "router.features.pairs"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change: dict, field: str) -> None:
    with pytest.raises(InvalidArgument) as e:
        features_from(FEATURES.describe() | change)
    assert e.value.field == field


def test_a_description_has_to_be_an_object() -> None:
    with pytest.raises(InvalidArgument):
        features_from(["ngrams"])


HIDDEN = PooledHidden(depth=2, dim=5)
hidden_settings = st.builds(
    PooledHidden,
    depth=st.integers(0, 1024),
    dim=st.integers(1, 64),
    max_tokens=st.integers(2, 2048),
    weight=st.floats(0.015625, 100.0),
)
ngram_settings = st.builds(
    NGrams,
    dim=st.integers(64, 512),
    shortest=st.integers(2, 4),
    longest=st.integers(4, 8),
    max_bytes=st.integers(64, 1000),
    quoted=st.floats(0.015625, 1.0),
    pairs=st.floats(0.0, 10.0),
)
all_features = st.one_of(
    st.builds(Features, ngram_settings),
    st.builds(Features, st.none(), hidden_settings),
    st.builds(Features, ngram_settings, hidden_settings),
)


def states(features: Features, count: int, seed: int) -> np.ndarray | None:
    """What the base might give for some texts, a state of zeros among them."""
    if features.hidden is None:
        return None
    rng = np.random.default_rng(seed)
    out = rng.normal(size=(count, features.hidden.dim)).astype(np.float32)
    out[::3] = 0
    return out


@given(all_features)
def test_every_description_reads_back(features: Features) -> None:
    described = json.loads(json.dumps(features.describe()))
    assert features_from(described) == features
    assert described["kind"] == features.kind


def test_n_grams_alone_are_described_by_themselves() -> None:
    assert json.dumps(Features(FEATURES).describe()) == (
        '{"kind": "ngrams", "version": 2, "dim": 2048, "shortest": 3, "longest": 5, '
        '"max_bytes": 4096, "quoted": 0.3, "pairs": 0.5}'
    )


@given(all_features, st.lists(st.text(max_size=40), max_size=5), st.integers(0, 9))
def test_dense_and_sparse_features_are_the_same(
    features: Features, texts: list[str], seed: int
) -> None:
    pooled = states(features, len(texts), seed)
    dense = features.dense(texts, pooled)
    assert dense.shape == (len(texts), features.dim)
    assert dense.dtype == np.float32
    for i, text in enumerate(texts):
        index, values = features.sparse(text, None if pooled is None else pooled[i])
        assert (np.diff(index) > 0).all()
        row = np.zeros(features.dim, np.float32)
        row[index] = values
        assert (row == dense[i]).all()
        low, high = features.bounds
        assert ((row >= np.float32(low)) & (row <= np.float32(high))).all()


def test_both_are_the_n_grams_and_then_the_weighted_direction_of_the_state() -> None:
    features = Features(FEATURES, PooledHidden(depth=1, dim=4, weight=0.5))
    pooled = np.array([[3.0, 0.0, -4.0, 0.0]], np.float32)
    row = features.dense(["spell it"], pooled)[0]
    assert (row[:2048] == dense("spell it")).all()
    assert row[2048:] == pytest.approx([0.3, 0.0, -0.4, 0.0])
    assert (features.dense(["spell it"], pooled * 1e30) == row).all()
    assert features.dense(["spell it"], pooled * 1e-30)[0] == pytest.approx(row)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_state_of_zeros_or_one_that_is_not_finite_says_nothing(bad: float) -> None:
    features = Features(FEATURES, HIDDEN)
    state = np.array([bad, 0, 0, 0, 0], np.float32)
    index, values = features.sparse("spell", state)
    assert (index == FEATURES.sparse("spell")[0]).all()
    assert (values == FEATURES.sparse("spell")[1]).all()
    assert not len(Features(None, HIDDEN).sparse("spell", state)[0])


def test_a_state_that_is_missing_or_of_another_size_is_refused() -> None:
    for features in (Features(None, HIDDEN), Features(FEATURES, HIDDEN)):
        for pooled in (None, np.ones(6, np.float32)):
            with pytest.raises(InvalidArgument) as e:
                features.sparse("spell", pooled)
            assert e.value.field == "pooled"


def test_features_of_nothing_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        Features(None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 2}, ""),
        ({"depth": -1}, ".depth"),
        ({"depth": 1.5}, ".depth"),
        ({"dim": 0}, ".dim"),
        ({"max_tokens": 1}, ".max_tokens"),
        ({"max_tokens": 1 << 20}, ".max_tokens"),
        ({"weight": 0.0}, ".weight"),
        ({"weight": 1e9}, ".weight"),
        ({"weight": None}, ".weight"),
    ],
)
def test_a_hidden_state_that_does_not_fit_is_refused_in_either_place(
    change: dict, field: str
) -> None:
    with pytest.raises(InvalidArgument) as e:
        features_from(HIDDEN.describe() | change)
    assert e.value.field == f"router.features{field}"
    both = Features(FEATURES, HIDDEN).describe()
    with pytest.raises(InvalidArgument) as e:
        features_from(both | {"hidden": HIDDEN.describe() | change})
    assert e.value.field == f"router.features.hidden{field}"


@pytest.mark.parametrize("part", ["ngrams", "hidden"])
def test_both_need_each_part(part: str) -> None:
    both = Features(FEATURES, HIDDEN).describe()
    del both[part]
    with pytest.raises(InvalidArgument) as e:
        features_from(both)
    assert e.value.field == f"router.features.{part}"
