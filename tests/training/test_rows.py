"""Rows from files: what is read, what is refused, and the tokens they become."""

from __future__ import annotations

import json
import random

import pytest

from mora_serve.errors import InvalidArgument
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.tasks import TASKS
from router_training.rows import TextRow, read_prompts, read_rows, token_row


def test_rows_of_all_files_are_read_in_order(tmp_path):
    """Other keys and empty lines are left alone; an adapter named twice counts once."""
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_text('{"prompt": "p", "answer": "a", "adapters": ["x", "y", "x"], "more": 1}\n\n')
    two.write_text('{"prompt": "é", "answer": "b"}')
    assert read_rows([one, two], labelled=False) == [
        TextRow("p", "a", ("x", "y")),
        TextRow("é", "b"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data: rows.jsonl, line 2: it is not a JSON object"),
        ("[" * 100_000, "data: rows.jsonl, line 2: it is not a JSON object"),
        ("[1]", "data: rows.jsonl, line 2: it is not a JSON object"),
        ('{"prompt": "p"}', "data: rows.jsonl, line 2: prompt and answer"),
        ('{"prompt": " ", "answer": "a"}', "data: rows.jsonl, line 2: prompt and answer"),
        ('{"prompt": "p", "answer": "a", "adapters": "x"}', "data: rows.jsonl, line 2: adapters"),
        ('{"prompt": "p", "answer": "a"}', "data: rows.jsonl, line 2: the row has no adapters"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    """By its file and number, with what it should be."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "answer": "a", "adapters": ["x"]}\n' + line)
    with pytest.raises(InvalidArgument) as error:
        read_rows([file], labelled=True)
    assert error.value.message.startswith(message)
    assert "; give " in error.value.message


def test_only_line_feeds_end_a_line(tmp_path):
    """JSON texts may hold other separators as they are; null is no adapters."""
    file = tmp_path / "rows.jsonl"
    prompt = "a\u2028b\u0085c"
    row = json.dumps({"prompt": prompt, "answer": "x", "adapters": None}, ensure_ascii=False)
    file.write_bytes(f"{row}\r\n{row}".encode())
    assert read_rows([file], labelled=False) == [TextRow(prompt, "x")] * 2
    assert read_prompts([file], "near") == [row, row]


def test_prompts_are_lines(tmp_path):
    """One a line, empty ones left out; a file that is not there is named."""
    file = tmp_path / "outside.txt"
    file.write_text("one\n\n  two  \n")
    assert read_prompts([file], "outside") == ["one", "two"]
    with pytest.raises(InvalidArgument, match=r"^outside: none\.txt: it cannot be read"):
        read_prompts([tmp_path / "none.txt"], "outside")


def test_tokens_are_those_of_the_demo_s_own_rows(base):
    """By the base's template: a prompt as the server sends it, an answer with its end token."""
    rng = random.Random(0)
    for task in TASKS.values():
        prompt, answer = task.example(rng)
        row = token_row(base.tokenizer, TextRow(prompt, answer), 512)
        assert row == tokens(Row(prompt, answer))


def test_a_row_longer_than_the_base_takes_is_refused(base):
    """With both lengths in the message, and where it stands."""
    row = TextRow("x" * 100, "y", (), "rows.jsonl, line 7")
    with pytest.raises(InvalidArgument, match=r"^prompts: rows\.jsonl, line 7 has 1\d\d tokens"):
        token_row(base.tokenizer, row, 64, "prompts")
    with pytest.raises(InvalidArgument, match=r"a row has 1\d\d tokens, the base takes 64"):
        token_row(base.tokenizer, TextRow("x" * 100, "y"), 64)
