"""Tokens and labels: answers alone are learned, prompts are the server's, every answer ends."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from benchmarks.families import byte_tokenizer
from mora_serve.errors import InvalidArgument
from mora_serve.model.tokenizer import Tokenizer
from router_training.tuning.encoding import CHATML, IGNORED, Encoded, Encoder
from router_training.tuning.formats import Example, Turn

END = 1


def chat(*turns: tuple[str, str], learned: tuple[str, ...] = ("assistant",)) -> Example:
    return Example("line 1", tuple(Turn(r, c, r in learned) for r, c in turns))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of bytes; its template puts no end after an answer."""
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(directory)
    return Tokenizer.load(directory, frozenset((END,)))


def learned(tokenizer: Tokenizer, row: Encoded) -> str:
    ids = [i for i, label in zip(row.ids, row.labels, strict=True) if label != IGNORED]
    return tokenizer.decode(ids, special=True)


def test_a_row_is_the_servers_prompt_and_an_answer_with_its_end(tokenizer: Tokenizer) -> None:
    """As the tokenizer itself makes a row; the end that the template lacks is put there."""
    row = Encoder(tokenizer, 99).encode(chat(("user", "2+2"), ("assistant", "4")))
    prompt, answer = tokenizer.row("2+2", "4")
    assert list(row.ids) == prompt + answer
    assert list(row.labels) == [IGNORED] * len(prompt) + answer
    assert row.ids[-1] == END
    assert row.end_added
    assert (row.learned, row.whole) == (len(answer), len(row.ids))


def test_every_answer_of_a_conversation_is_learned(tokenizer: Tokenizer) -> None:
    """What lies before each is what the server would be sent for it."""
    turns = [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    row = Encoder(tokenizer, 99).encode(chat(*turns))
    assert learned(tokenizer, row) == "24<eos>"
    asked = tokenizer.chat(turns[:-1])
    assert list(row.ids[: len(asked)]) == asked


def test_turns_after_the_last_answer_are_left_out(tokenizer: Tokenizer) -> None:
    turns = [("user", "1"), ("assistant", "2"), ("user", "3")]
    row = Encoder(tokenizer, 99).encode(chat(*turns))
    assert tokenizer.decode(row.ids, special=True) == "<user>1<assistant>2<eos>"


def test_prompts_too_where_they_are_asked_for(tokenizer: Tokenizer) -> None:
    row = Encoder(tokenizer, 99, inputs=True).encode(chat(("user", "1"), ("assistant", "2")))
    assert row.labels == row.ids


def test_text_is_learned_whole_and_pieces_as_they_say(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, 99)
    assert learned(tokenizer, encoder.encode(Example("a", pieces=(("abc", True),)))) == "abc<eos>"
    pieces = (("Q: 1 A:", False), (" 2", True), (" Q: 3 A:", False), (" 4", True))
    assert learned(tokenizer, encoder.encode(Example("a", pieces=pieces))) == " 2 4<eos>"
    tail = encoder.encode(Example("a", pieces=(*pieces[:2], ("tail", False))))
    assert learned(tokenizer, tail) == " 2"


def test_what_is_too_long_is_cut_and_known(tokenizer: Tokenizer) -> None:
    """Also where nothing to be learned is left."""
    example = chat(("user", "12345678"), ("assistant", "abc"))
    prompt, answer = (len(ids) for ids in tokenizer.row("12345678", "abc"))
    row = Encoder(tokenizer, prompt + 2).encode(example)
    assert (len(row.ids), row.whole, row.learned) == (prompt + 2, prompt + answer, 2)
    assert Encoder(tokenizer, 5).encode(example).learned == 0


def test_chatml_where_the_vocabulary_has_no_such_tokens(tokenizer: Tokenizer) -> None:
    """They are text like any other, and learned; the end is put there."""
    encoder = Encoder(tokenizer, 999, template=CHATML)
    row = encoder.encode(chat(("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")))
    assert learned(tokenizer, row) == "2<|im_end|>\n4<|im_end|>\n<eos>"


def test_a_question_is_what_comes_before_the_last_answer(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, 99)
    turns = [("user", "1"), ("assistant", "2"), ("user", "3")]
    assert encoder.question(chat(*turns, ("assistant", "4"))) == tokenizer.chat(turns)


def test_a_question_to_a_base_without_a_template(tokenizer: Tokenizer) -> None:
    hf = copy.deepcopy(tokenizer.hf)
    hf.chat_template = None
    encoder = Encoder(Tokenizer(hf, tokenizer.eos_ids), 99)
    row = chat(("user", "2+2"), ("assistant", "4"))
    asked = encoder.question(row)
    assert asked
    assert list(encoder.encode(row).ids)[: len(asked)] == asked


def test_a_template_that_shows_no_answers(tokenizer: Tokenizer) -> None:
    """The demo's does not: a row is the prompt that it makes, the answer, and the end."""
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    encoder = Encoder(tokenizer, 99, template=template)
    row = encoder.encode(chat(("user", "a"), ("assistant", "b")))
    assert tokenizer.decode(row.ids, special=True) == "1ab<eos>"
    assert learned(tokenizer, row) == "b<eos>"
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(InvalidArgument, match="chat_template: line 1: the template changes"):
        encoder.encode(chat(*turns))


def test_a_template_that_refuses_names_the_row(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, 99, template="{{ raise_exception('no system') }}")
    with pytest.raises(InvalidArgument, match="datasets: line 1: messages: the model's chat"):
        encoder.encode(chat(("user", "1"), ("assistant", "2")))


def test_without_a_template_a_row_is_prompt_and_answer(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer.load(tmp_path, frozenset((END,)))
    encoder = Encoder(tokenizer, 99)
    row = encoder.encode(chat(("user", "1"), ("assistant", "2")))
    assert tokenizer.decode(row.ids, special=True) == "12<eos>"
    with pytest.raises(InvalidArgument, match="the base has no chat template"):
        encoder.encode(chat(("system", "S"), ("user", "1"), ("assistant", "2")))
