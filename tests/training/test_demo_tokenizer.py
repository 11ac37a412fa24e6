"""The demo's tokenizer: every text round-trips, and chat and plain prompts agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.errors import InvalidArgument
from mora_serve.model.tokenizer import Tokenizer
from router_training.demo.tokenizer import (
    END,
    SPECIALS,
    TOKEN_ID,
    VOCAB_SIZE,
    build_tokenizer,
    encode_turns,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Saved, and loaded as the server loads it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(512).save_pretrained(str(directory))
    return Tokenizer.load(directory, frozenset())


TEXTS = st.text(max_size=60).filter(lambda t: not any(s in t for s in SPECIALS))


@given(text=TEXTS)
def test_any_text_round_trips(tokenizer, text):
    """Decoding the encoded text gives the text; byte b is token b."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == encode_turns(text)
    assert [i for i in ids if i < 256] == list(text.encode())


@given(text=TEXTS)
def test_one_user_turn_is_a_plain_prompt(tokenizer, text):
    """The chat template and the plain prompt give the same tokens."""
    assert tokenizer.chat([("user", text)]) == tokenizer.encode(text)


def test_a_chat_is_its_system_turn_and_its_last_user_turn(tokenizer):
    """Earlier exchanges are left out; what is left reads as in training."""
    system = ("system", "be brief")
    ids = tokenizer.chat([system, ("user", "a"), ("assistant", "b"), ("user", "c")])
    assert ids == encode_turns("c", (system,))


def test_a_chat_needs_a_user_turn_and_known_roles(tokenizer):
    """The template says what is wrong."""
    with pytest.raises(InvalidArgument, match="needs a user turn"):
        tokenizer.chat([("system", "be brief")])
    with pytest.raises(InvalidArgument, match="roles are"):
        tokenizer.chat([("tool", "x"), ("user", "y")])


def test_earlier_turns_are_closed_by_the_end_token():
    """A training row may have an exchange ahead of its prompt."""
    ids = encode_turns("c", (("user", "a"), ("assistant", "b")))
    assert ids[:6] == [*encode_turns("a"), *b"b", TOKEN_ID[END]]
    assert ids[6:] == encode_turns("c")[1:]


def test_sizes_fit_the_kernels(tokenizer):
    """Every id of the padded vocabulary has a token; generation ends at the end token."""
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert VOCAB_SIZE % 64 == 0
    assert tokenizer.eos_ids == {TOKEN_ID[END]}
