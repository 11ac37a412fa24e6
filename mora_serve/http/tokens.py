"""The bytes that a token stands for, which may be a part of a character."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property

from mora_serve.server.prompts import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece writes a byte
_SPACE = "\u2581"  # and a space


class TokenTexts:
    """Texts and bytes of a vocabulary's tokens, by what the tokenizer calls them.

    Vocabularies write bytes as GPT-2 does (each as a letter of an alphabet of 256) or as
    SentencePiece does (as characters, with marks for spaces and for single bytes).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def load(self) -> None:
        """Read the vocabulary, which takes a moment, ahead of its first use."""
        _ = self._names, self._in_letters

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; of one without a name, none."""
        name = self._names.get(token, "")
        if byte := _BYTE.fullmatch(name):
            return bytes((int(byte[1], 16),))
        if self._in_letters and all(c in _LETTERS for c in name):
            return bytes(_LETTERS[c] for c in name)
        return name.replace(_SPACE, " ").encode("utf-8", "replace")

    def text_of(self, token: int) -> str:
        """The text of a token; a part of a character is U+FFFD."""
        return self.bytes_of(token).decode("utf-8", "replace")

    @cached_property
    def _names(self) -> Mapping[int, str]:
        return {token: name for name, token in self._tokenizer.vocabulary().items()}

    @cached_property
    def _in_letters(self) -> bool:
        """Whether the vocabulary is of GPT-2's kind: a space is its letter for one."""
        spaces = sum(name.startswith("Ġ") for name in self._names.values())
        return spaces > sum(name.startswith(_SPACE) for name in self._names.values())


def _letters() -> dict[str, int]:
    """GPT-2's alphabet: printable characters stand for themselves, other bytes follow from 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


_LETTERS = _letters()
