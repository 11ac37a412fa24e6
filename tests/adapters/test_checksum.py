"""Sums that senders state: of all files, in one order, compared whatever their case."""

from __future__ import annotations

import hashlib

import pytest

from mora_serve.adapters.checksum import check_sum, stated_sum
from mora_serve.adapters.validate import read_upload
from mora_serve.errors import InvalidArgument
from tests.adapters.make import LIMITS, SHAPE, config, files, tensors

CARD = b'{"tasks": ["t"]}'


def test_the_sum_is_what_cat_and_sha256sum_give() -> None:
    data = files(config(), tensors())
    for card in (None, CARD):
        stated = hashlib.sha256(data[0] + data[1] + (card or b"")).hexdigest()
        adapter = read_upload(*data, card, SHAPE, LIMITS, sha256=stated)
        assert adapter == read_upload(*data, card, SHAPE, LIMITS)


@pytest.mark.parametrize("changed", ["config", "weights", "card", "no card"])
def test_any_file_that_was_changed_is_refused(changed: str) -> None:
    data = files(config(), tensors())
    stated = hashlib.sha256(data[0] + data[1] + CARD).hexdigest()
    given = {
        "config": (data[0] + b" ", data[1], CARD),
        "weights": (data[0], data[1][:-1] + bytes([data[1][-1] ^ 1]), CARD),
        "card": (data[0], data[1], CARD + b"\n"),
        "no card": (data[0], data[1], None),
    }[changed]
    with pytest.raises(InvalidArgument, match=f"^sha256: .* {stated}; ") as e:
        read_upload(*given, SHAPE, LIMITS, sha256=stated)
    assert e.value.reason == "SHA256_MISMATCH"
    check_sum(stated, (*data, CARD))


def test_a_sum_can_be_required() -> None:
    assert stated_sum("", required=False) == ""
    with pytest.raises(InvalidArgument, match=r"^sha256: it is missing.*require_sha256") as e:
        stated_sum("", required=True)
    assert e.value.reason == "SHA256_REQUIRED"
    assert stated_sum("AB" * 32, required=True) == "ab" * 32


@pytest.mark.parametrize("text", ["x", "a" * 63, "g" * 64, "a" * 65, "\n" + "a" * 63, "é" * 64])
def test_what_is_no_sum_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="64 hexadecimal digits") as e:
        stated_sum(text, required=False)
    assert e.value.reason == "INVALID_SHA256"
