"""The bytes of tokens, for each of the tokenizers' ways to write them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from mora_serve.http.tokens import TokenTexts
from mora_serve.model.loading import read_base


class Vocabulary:
    """A tokenizer that knows its names only."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def vocabulary(self) -> Mapping[str, int]:
        return {name: i for i, name in enumerate(self._names)}


def test_names_as_gpt2_writes_them() -> None:
    texts = TokenTexts(Vocabulary("Ġhello", "Ċ", "Ã", "©", "<|end|>"))  # type: ignore[arg-type]
    assert [texts.bytes_of(i) for i in range(6)] == [
        *(b" hello", b"\n", b"\xc3", b"\xa9", b"<|end|>", b"")
    ]
    assert texts.text_of(2) == "\ufffd"


def test_names_as_sentencepiece_writes_them() -> None:
    names = ("\u2581hello", "<0x0A>", "<0xC3>", "é", "\u2581")
    texts = TokenTexts(Vocabulary(*names))  # type: ignore[arg-type]
    assert [texts.bytes_of(i) for i in range(5)] == [b" hello", b"\n", b"\xc3", "é".encode(), b" "]


@pytest.mark.parametrize("text", ["hello world", "  two\n lines\t", "Grüße, 日本 🎉", "a\u0301"])
def test_the_bytes_of_a_texts_tokens_are_the_texts(text: str) -> None:
    """By the tokenizer itself."""
    tokenizer = read_base("demo").tokenizer
    texts = TokenTexts(tokenizer)
    joined = b"".join(texts.bytes_of(t) for t in tokenizer.plain(text))
    assert joined.decode() == tokenizer.decode(tokenizer.plain(text))
