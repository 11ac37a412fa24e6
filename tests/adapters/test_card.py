"""The routing card: read strictly, limited, and written back as it was."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.card import MAX_TEXT, RoutingCard, check_card, parse_card
from mora_serve.errors import InvalidArgument
from tests.adapters.make import LIMITS

CARD = RoutingCard(
    description="Reverses words.",
    tasks=("reverse", "text.reverse"),
    group="operations",
    prompts=("Please reverse 'kavo'.", "zurück: größe"),
    base_fingerprint="ab12",
    router_digest="cd34",
)


def test_a_card_survives_being_written_and_read() -> None:
    assert parse_card(CARD.to_json(), LIMITS) == CARD
    assert parse_card(b"{}", LIMITS) == RoutingCard()


def test_only_examples_make_an_adapter_routable() -> None:
    assert CARD.routable
    assert not replace(CARD, prompts=()).routable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"promts": []}, "unknown key 'promts'; did you mean 'prompts'?"),
        ({"x": 1}, "unknown key 'x'; known are description"),
        ({"prompts": "one"}, "prompts: it has to be a list of strings"),
        ({"prompts": [1]}, "prompts: it has to be a list of strings"),
        ({"prompts": None}, "prompts: it has to be a list of strings"),
        ({"prompts": [" "]}, "prompts: a prompt is empty"),
        ({"prompts": ["\ud800"]}, "prompts: the text holds half of a surrogate pair"),
        ({"prompts": ["x"] * 65}, r"prompts: 65 are more than adapters.max_prompts \(64\)"),
        ({"prompts": ["x" * (MAX_TEXT + 1)]}, "prompts: 8193 characters are more than 8192"),
        ({"description": ["x"]}, "description: it has to be a string"),
        ({"description": "x" * (MAX_TEXT + 1)}, "description: 8193 characters"),
        ({"tasks": ["Not a name"]}, "tasks: 'Not a name' is not a valid name"),
        ({"tasks": ["t"] * 65}, "tasks: 65 are more"),
        ({"group": "../x"}, "group: '../x' is not a valid name"),
        ({"base_fingerprint": "a b"}, "base_fingerprint: 'a b' is not a fingerprint"),
        ({"router_digest": "x" * 129}, "router_digest: "),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as e:
        parse_card(json.dumps(json.loads(CARD.to_json()) | changes).encode(), LIMITS)
    assert len(e.value.message) < 400


def test_a_card_that_was_built_is_held_to_the_same_limits() -> None:
    check_card(CARD, LIMITS)
    with pytest.raises(InvalidArgument, match="prompts"):
        check_card(replace(CARD, prompts=("x",) * 3), replace(LIMITS, max_prompts=2))


@given(st.binary(max_size=60))
def test_any_bytes_are_a_card_or_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidArgument):
        check_card(parse_card(data, LIMITS), LIMITS)
