"""Rows of every form become examples, and what is wrong with one is said with its place."""

from __future__ import annotations

from typing import Any

import pytest

from mora_serve.errors import InvalidArgument
from router_training.tuning.formats import Example, Seen, Turn, example_of
from router_training.tuning.settings import Dataset

ASKED, ANSWERED = Turn("user", "Q", False), Turn("assistant", "A", True)


def read(row: dict[str, Any], **options: Any) -> Example:
    return example_of("rows.jsonl, line 7", row, Dataset("rows.jsonl", **options), Seen())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"prompt": "Q", "completion": "A"},
        {
            "prompt": [{"role": "user", "content": "Q"}],
            "completion": [{"role": "assistant", "content": "A"}],
        },
    ],
    ids=["messages", "sharegpt", "alpaca", "prompt_completion", "its turns"],
)
def test_the_same_question_in_every_form(row: dict[str, Any]) -> None:
    example = read(row)
    assert example.turns == (ASKED, ANSWERED)
    assert (example.question, example.answer, example.prompt) == ((ASKED,), "A", "Q")


def test_an_input_and_a_system_prompt() -> None:
    example = read({"instruction": "Sum", "input": "1 2", "output": "3", "system": "Be brief."})
    assert [t.content for t in example.turns] == ["Be brief.", "Sum\n\n1 2", "3"]


def test_plain_text_and_segments() -> None:
    assert read({"text": "All of it."}).pieces == (("All of it.", True),)
    row = {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]}
    assert read(row).pieces == (("a", False), ("b", True))


def test_roles_to_train_and_a_turn_of_its_own_mind() -> None:
    """Any roles may be learned, and a turn may say for itself whether it is."""
    turns = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2", "train": False},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ]
    assert [t.learned for t in read({"messages": turns}).turns] == [False, False, False, True]
    both = read({"messages": turns}, roles_to_train=("user", "assistant")).turns
    assert [t.learned for t in both] == [True, False, True, True]


def test_renamed_roles_are_counted() -> None:
    seen = Seen()
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    example_of("a", row, Dataset("a"), seen)
    assert seen.roles == {("human", "user"): 1, ("gpt", "assistant"): 1}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"question": "Q"}, {}, "has the columns 'question', which are those of no known form"),
        ({"messages": "hello"}, {}, "messages is not a list of turns"),
        ({"messages": []}, {}, "messages is not a list of turns"),
        ({"messages": ["hello"]}, {}, "a turn is not an object"),
        ({"messages": [{"role": "user"}]}, {}, "a turn has no role or no text"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, {}, "the role 'wizard' is not known"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "no turn is of assistant"),
        ({"instruction": "Q", "output": 3}, {}, "output is not a text"),
        ({"text": ""}, {}, "text is not a text"),
        ({"prompt": "Q"}, {"type": "prompt_completion"}, "completion is not a text"),
        ({"prompt": "Q", "completion": [{}]}, {}, "prompt and completion are of two kinds"),
        ({"segments": [{"text": "a", "label": False}]}, {}, "no segment has label true"),
        ({"segments": [{"label": True}]}, {}, "a segment has no text"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(
    row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument) as error:
        read(row, **options)
    assert "rows.jsonl, line 7" in error.value.message
    assert message in error.value.message
