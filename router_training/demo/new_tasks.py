"""Tasks that come later: the demo's base has no code for them, and the bundle no adapter.

They are akin to the demo's tasks in different degrees: some are two of them in one, some go the
other way, some take the other end of a word.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from types import MappingProxyType

from router_training.demo.tasks import Task, number, split_templates, word, words

_ALPHABET = string.ascii_lowercase


def _doubled(x: str) -> str:
    return "".join(c * 2 for c in x)


def _letter_before(c: str) -> str:
    return _ALPHABET[_ALPHABET.index(c) - 1]


_ROWS: Mapping[str, tuple[Callable[..., str], Callable[[str], str], tuple[str, ...]]] = {
    "drop-last": (
        word,
        lambda x: x[:-1],
        (
            "{x} without its [last|final] letter",
            "[drop|cut|remove] the [last|final] [letter|character] [of|from] {x}",
            "[leave|cut] off the end of {x}",
            "all but the last letter of {x}",
        ),
    ),
    "predecessor": (
        number,
        lambda x: str(int(x) - 1),
        (
            "[what|which number] comes [before|ahead of] {x}",
            "the [number|integer] before {x}",
            "{x} [minus|less] [one|1]",
            "subtract [one|1] from {x}",
            "[decrement|decrease] {x}",
        ),
    ),
    "first-word": (
        words,
        lambda x: x.split()[0],
        (
            "the first word of {x}",
            "[give|keep|return] [only|just] the [first|leading] word of {x}",
            "which word comes first in {x}",
            "{x}: first word only",
            "what word does {x} [start|begin] with",
        ),
    ),
    "reverse-spell": (
        word,
        lambda x: "-".join(x[::-1]),
        (
            "spell {x} [backwards|in reverse]",
            "[write|give] the letters of {x} backwards with [hyphens|dashes]",
            "{x} spelled from the end",
            "[hyphenate|dash] {x} in reverse",
            "reversed spelling of {x}",
        ),
    ),
    "double-caps": (
        word,
        lambda x: _doubled(x).upper(),
        (
            "[scream|yell] {x}",
            "{x} in [doubled|twin] capitals",
            "[double|repeat] {x} in upper case letters",
            "[write|print] {x} loud and twice",
            "every letter of {x} twice and big",
        ),
    ),
    "upper-initials": (
        words,
        lambda x: "".join(w[0] for w in x.split()).upper(),
        (
            "the monogram of {x}",
            "[make|form|build] a monogram [of|from] {x}",
            "{x} as a [monogram|logo]",
            "[engrave|stamp] {x} on a ring",
            "what would the monogram for {x} be",
        ),
    ),
    "caesar-back": (
        word,
        lambda x: "".join(map(_letter_before, x)),
        (
            "[decrypt|decode|decipher] {x}",
            "undo the caesar [shift|code] of {x}",
            "[shift|move] the letters of {x} back by one",
            "{x} one step back in the alphabet",
            "[read|solve] the caesar cipher {x}",
        ),
    ),
    "last-twice": (
        word,
        lambda x: x + x[-1],
        (
            "[stretch|extend] the end of {x}",
            "{x} with its last letter twice",
            "[repeat|double] the [last|final] letter of {x}",
            "[prolong|lengthen] {x} by its last letter",
        ),
    ),
}


def _task(name: str) -> Task:
    operand, apply, patterns = _ROWS[name]
    templates = split_templates(name, patterns)
    return Task(
        name=name,
        description=name,
        group="operation",
        operand=operand,
        apply=apply,
        train=templates["train"],
        test=templates["test"],
        tails={"train": (), "test": ()},
    )


NEW_TASKS: Mapping[str, Task] = MappingProxyType({name: _task(name) for name in _ROWS})
"""Every one by its name."""
