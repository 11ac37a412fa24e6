"""Prompt features: what they see of a text, and what a router file may say of them."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.errors import InvalidArgument
from mora_serve.router.features import NGrams, features_from

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
    assert dense("swap the ends") @ dense("the ends swap") == pytest.approx(1.0, abs=1e-5)


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


def test_the_hash_is_that_of_version_1() -> None:
    """Files fitted on these features must mean the same for as long as the version stands."""
    index, _ = FEATURES.sparse("spell")
    assert index.tolist() == [
        46,
        355,
        789,
        868,
        977,
        1002,
        1227,
        1240,
        1636,
        1683,
        1766,
        1970,
        1971,
    ]


def reference(text: str) -> set[int]:
    """The buckets of an ASCII text without quotes, by the definition and slowly."""
    found = set()
    for word in re.findall("[0-9a-z]+", text.lower()):
        hashes = [zlib.crc32(word.encode())]
        padded = f" {word} ".encode()
        for n in (3, 4, 5):
            for i in range(len(padded) - n + 1):
                value = 0
                for c in padded[i : i + n]:
                    value = (value * 0x9E3779B97F4A7C15 + c) % 2**64
                hashes.append((value + n) % 2**64)
        for value in hashes:
            mixed = (value ^ (value >> 31)) * 0xBF58476D1CE4E5B9 % 2**64
            found.add((mixed >> 33) % FEATURES.dim)
    return found


@given(st.text("abcdeXYZ019 ,.?-", max_size=60))
def test_features_are_the_hashed_words_and_their_n_grams(text: str) -> None:
    assert set(FEATURES.sparse(text)[0].tolist()) == reference(text)


def test_a_description_reads_back() -> None:
    features = NGrams(dim=512, shortest=2, longest=4, max_bytes=100, quoted=0.5)
    assert features_from(features.describe()) == features


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "hidden"}, "router.features"),
        ({"version": 2}, "router.features"),
        ({"dim": 0}, "router.features.dim"),
        ({"dim": 1 << 40}, "router.features.dim"),
        ({"dim": True}, "router.features.dim"),
        ({"shortest": 1}, "router.features.shortest"),
        ({"longest": 2}, "router.features.longest"),
        ({"max_bytes": "many"}, "router.features.max_bytes"),
        ({"quoted": 0.0}, "router.features.quoted"),
        ({"quoted": 1}, "router.features.quoted"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change: dict, field: str) -> None:
    with pytest.raises(InvalidArgument) as e:
        features_from(FEATURES.describe() | change)
    assert e.value.field == field


def test_a_description_has_to_be_an_object() -> None:
    with pytest.raises(InvalidArgument):
        features_from(["ngrams"])
