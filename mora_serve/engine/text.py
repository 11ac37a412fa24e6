"""From tokens to text while they arrive: whole characters only, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# A character takes at most four byte tokens; more without progress are not a character.
_PATIENCE = 8
_WINDOW = 4 * _PATIENCE


class TextStream:
    """Incremental text of one answer; what was returned once never changes.

    ``decode`` turns token ids into text, U+FFFD standing for bytes that are no character (yet).
    Together ``push`` and ``flush`` return ``decode`` of all tokens, cut before the stop string
    that is complete first (the longest of those that end at the same character).
    The cost of a token does not depend on how many came before.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self._decode = decode
        self._window: list[int] = []  # context, then tokens since; decoded together
        self._context = 0  # tokens at the window's start that only fix spaces and joins
        self._done = 0  # characters of the window's text already handed on
        self._stuck = 0  # tokens since the last progress
        self._held = ""  # text that may turn out to be the start of a stop string
        self._matchers = [_Matcher(s) for s in stop if s]

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became final, often empty."""
        if self.stopped:
            return ""
        return self._until_stop(self._advance(token_id))

    def flush(self) -> str:
        """The rest, when no more tokens follow; incomplete characters appear as U+FFFD."""
        if self.stopped:
            return ""
        rest = self._decode(self._window)[self._done :] if self._window else ""
        self._window, self._context, self._done = [], 0, 0
        text = self._until_stop(rest)
        text, self._held = text + self._held, ""
        return text

    def _advance(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(_UNFINISHED)
        self._stuck = 0 if len(whole) > self._done else self._stuck + 1
        if self._stuck > _PATIENCE:
            whole = text
        piece = whole[self._done :]
        if piece and whole == text:
            self._restart(self._window[self._context :])
        elif self._stuck > _PATIENCE:  # tokens without text: keep the context that has some
            self._restart(self._window[: self._context])
        elif len(self._window) > _WINDOW:  # every token so far ended inside a character
            self._restart(self._window[-_WINDOW // 2 :])
        else:
            self._done += len(piece)
        return piece

    def _restart(self, window: list[int]) -> None:
        text = self._decode(window) if window else ""
        whole = text if self._stuck > _PATIENCE else text.rstrip(_UNFINISHED)
        self._window, self._context, self._done = window, len(window), len(whole)
        self._stuck = 0

    def _until_stop(self, piece: str) -> str:
        if not self._matchers:
            return piece
        text = self._held + piece
        for end, char in enumerate(piece, len(self._held) + 1):
            longest = 0
            for matcher in self._matchers:
                if matcher.feed(char):
                    longest = max(longest, len(matcher.pattern))
            if longest:
                self.stopped = True
                self._held = ""
                return text[: end - longest]
        keep = len(text) - max(m.matched for m in self._matchers)
        self._held = text[keep:]
        return text[:keep]


class _Matcher:
    """Knuth-Morris-Pratt: how much of the pattern the text seen so far ends with."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        self._border = [0] * len(pattern)
        length = 0
        for i in range(1, len(pattern)):
            while length and pattern[i] != pattern[length]:
                length = self._border[length - 1]
            length += pattern[i] == pattern[length]
            self._border[i] = length

    def feed(self, char: str) -> bool:
        """Add a character; True when the pattern is complete, after which it is spent."""
        while self.matched and char != self.pattern[self.matched]:
            self.matched = self._border[self.matched - 1]
        self.matched += char == self.pattern[self.matched]
        return self.matched == len(self.pattern)
