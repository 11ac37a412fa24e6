"""PEFT's rank and alpha patterns: regular expressions that arrive in an adapter's configuration.

They come from outside, and Python's ``re`` can take exponential time on a hostile one. So they
are matched here by following the set of positions that a match can have reached, which is
polynomial, under a budget of steps. What is understood is what such patterns use: characters,
``.``, escapes, classes, groups, ``|``, ``* + ? {m,n}`` (lazy ones too), ``^`` and ``$``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

from mora_serve.adapters.untrusted import quoted
from mora_serve.errors import InvalidArgument

T = TypeVar("T")

BUDGET = 1_000_000  # steps for all patterns of one adapter, about a second at worst
MAX_PATTERNS = 2048
MAX_LENGTH = 512  # characters of one pattern

_PLAIN = re.compile(r"(?:[A-Za-z0-9_.-]|\\\.)*")  # nothing in it can repeat: safe in re
_COUNT = re.compile(r"\{(\d{1,3})(?:(,)(\d{1,3})?)?\}")


class Patterns(Generic[T]):
    """The patterns of one adapter in their order: the first that matches a module counts.

    ``values`` maps a pattern to what it stands for; ``name`` is the configuration's key.
    Raises InvalidArgument for a pattern that is not understood, or too many.
    """

    def __init__(self, name: str, values: Mapping[str, T]) -> None:
        if len(values) > MAX_PATTERNS:
            raise _unsupported(name, f"{len(values)} patterns are more than {MAX_PATTERNS}")
        self._name = name
        self._budget = _Budget(BUDGET)
        self._tests = [(_compile(name, pattern), value) for pattern, value in values.items()]

    def get(self, module: str, default: T) -> T:
        """What the first matching pattern gives for a module's path, else ``default``.

        A pattern matches the whole path or its end after a ``.``, as in PEFT's
        ``get_pattern_key``. Raises InvalidArgument when matching takes too long.
        """
        text = _Text(module, self._budget)
        try:
            for matches, value in self._tests:
                self._budget.spend(1)
                if matches(text):
                    return value
        except _TooCostlyError:
            raise _unsupported(self._name, "the patterns take too long to match") from None
        return default


class _UnsupportedError(Exception):
    pass


class _TooCostlyError(Exception):
    pass


class _Budget:
    def __init__(self, steps: int) -> None:
        self._left = steps

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise _TooCostlyError


class _Text:
    """A module's path. A set of positions in it is an integer with one bit a position."""

    def __init__(self, text: str, budget: _Budget) -> None:
        self.text = text
        self.end = 1 << len(text)
        self.budget = budget
        self._places: dict[str, int] = {}

    def where(self, single: re.Pattern[str]) -> int:
        """The positions whose character the pattern of a single character matches."""
        places = self._places.get(single.pattern)
        if places is None:
            self.budget.spend(len(self.text))
            places = sum(1 << i for i, c in enumerate(self.text) if single.fullmatch(c))
            self._places[single.pattern] = places
        return places


_Step = Callable[[_Text, int], int]  # positions before -> positions after


def _unsupported(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name}: {why}; give the modules by name instead",
        field=name,
        reason="UNSUPPORTED_PATTERN",
    )


def _compile(name: str, pattern: str) -> Callable[[_Text], bool]:
    if len(pattern) > MAX_LENGTH:
        raise _unsupported(name, f"{quoted(pattern)} is longer than {MAX_LENGTH} characters")
    if _PLAIN.fullmatch(pattern):
        plain = re.compile(rf"(?:.*\.)?(?:{pattern})")
        return lambda text: plain.fullmatch(text.text) is not None
    try:
        step = _Parser(pattern).parse()
    except (_UnsupportedError, RecursionError):
        raise _unsupported(
            name,
            f"{quoted(pattern)} is not supported (only characters, . [] () | * + ? {{m,n}} ^ $ "
            "and escapes are)",
        ) from None
    dot = re.compile(r"\.")
    return lambda text: bool(step(text, 1 | text.where(dot) << 1) & text.end)


class _Parser:
    """Recursive descent over one pattern; each part becomes a step between position sets."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def parse(self) -> _Step:
        step = self._alternatives()
        if self._at < len(self._pattern):
            raise _UnsupportedError
        return step

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _alternatives(self) -> _Step:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _either(options)

    def _sequence(self) -> _Step:
        parts: list[_Step] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._part())
        return _in_turn(parts)

    def _part(self) -> _Step:
        if self._take("^"):
            return lambda text, places: places & 1
        if self._take("$"):
            return lambda text, places: places & text.end
        step = self._atom()
        repeat = self._repeat()
        if repeat is None:
            return step
        self._take("?")  # lazy: the same strings match
        if self._repeat() is not None:
            raise _UnsupportedError
        return _repeated(step, *repeat)

    def _repeat(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        count = _COUNT.match(self._pattern, self._at)
        if count is None:
            return None
        self._at = count.end()
        least = int(count[1])
        most = None if count[2] and not count[3] else int(count[3] or least)
        if most is not None and most < least:
            raise _UnsupportedError
        return least, most

    def _atom(self) -> _Step:
        if self._take("("):
            if not self._take("?:") and self._peek() == "?":
                raise _UnsupportedError
            step = self._alternatives()
            if not self._take(")"):
                raise _UnsupportedError
            return step
        if self._take("["):
            return _single(f"[{self._class()}]")
        c = self._peek()
        self._at += 1
        if c == "\\":
            escaped = self._peek()
            self._at += 1
            if not escaped or (escaped.isalnum() and escaped not in "dDwWsS"):
                raise _UnsupportedError
            return _single(c + escaped)
        if c in "*+?{}]":
            raise _UnsupportedError
        return _single("." if c == "." else re.escape(c))

    def _class(self) -> str:
        """The inside of a class; ``re`` itself reads it, for one character is always quick."""
        start = self._at
        self._take("^")
        self._take("]")
        while not self._take("]"):
            if self._peek() in ("", "[", "&", "~", "|") or self._pattern[self._at :][:2] == "--":
                raise _UnsupportedError  # set operations in some later version of re
            self._at += 2 if self._peek() == "\\" else 1
        return self._pattern[start : self._at - 1]


def _single(pattern: str) -> _Step:
    try:
        one = re.compile(pattern)
    except re.error:
        raise _UnsupportedError from None

    def step(text: _Text, places: int) -> int:
        text.budget.spend(1)
        return (places & text.where(one)) << 1

    return step


def _in_turn(parts: list[_Step]) -> _Step:
    def step(text: _Text, places: int) -> int:
        for part in parts:
            if not places:
                break
            places = part(text, places)
        return places

    return step


def _either(options: list[_Step]) -> _Step:
    def step(text: _Text, places: int) -> int:
        text.budget.spend(1)
        after = 0
        for option in options:
            after |= option(text, places)
        return after

    return step


def _repeated(part: _Step, least: int, most: int | None) -> _Step:
    def step(text: _Text, places: int) -> int:
        for _ in range(least):
            text.budget.spend(1)
            before, places = places, part(text, places)
            if places == before:  # it stays so
                break
        reached, count = places, least
        while most is None or count < most:
            text.budget.spend(1)
            places = part(text, places)
            if not places & ~reached:
                break
            reached |= places
            count += 1
        return reached

    return step
