"""The synthetic task world: what each demo adapter is to learn, and how it is asked for.

Everything is drawn from the ``random.Random`` that the caller hands over.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from router_training.demo.paraphrases import CLOSINGS, ECHOES, OPENINGS, PATTERNS, TAILS, expand

Split = Literal["train", "test"]

VOWELS = "aeiou"
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_SPLIT_SEED = 20_240  # which templates are kept for testing


@dataclass(frozen=True)
class Task:
    """One skill: ``apply`` maps an operand drawn by ``operand`` to the right answer.

    ``train`` and ``test`` are disjoint templates with one ``{x}`` each for the quoted operand.
    ``tails`` are a style's ways to dress the answer to another request, split in the same way.
    """

    name: str
    description: str
    group: Literal["operation", "style"]
    operand: Callable[[random.Random], str]
    apply: Callable[[str], str]
    train: tuple[str, ...]
    test: tuple[str, ...]
    tails: Mapping[Split, tuple[str, ...]]

    def draw(self, rng: random.Random) -> str:
        """An operand whose answer is neither empty nor the operand: an echo is never right."""
        while self.apply(x := self.operand(rng)) in ("", x):
            pass
        return x

    def example(self, rng: random.Random, templates: Split = "train") -> tuple[str, str]:
        """(prompt, answer), the prompt from the templates of the given split."""
        x = self.draw(rng)
        tails = self.tails[templates]
        if tails and rng.random() < 0.5:
            request = rng.choice(ECHOES).format(x=f"'{x}'")
            return phrase(rng, join(rng, request, rng.choice(tails))), self.apply(x)
        return phrase(rng, self.request(rng, x, templates)), self.apply(x)

    def request(self, rng: random.Random, x: str, templates: Split = "train") -> str:
        """The bare request for an operand."""
        template = rng.choice(self.train if templates == "train" else self.test)
        return template.format(x=f"'{x}'")

    def examples(self, seed: int, count: int, templates: Split = "train") -> list[tuple[str, str]]:
        """``count`` distinct prompts and their answers; the same for the same arguments."""
        rng = random.Random(f"{self.name}/{templates}/{seed}")
        found: dict[str, str] = {}
        while len(found) < count:
            prompt, answer = self.example(rng, templates)
            found[prompt] = answer
        return list(found.items())


def join(rng: random.Random, request: str, tail: str) -> str:
    """A request and the style that its answer is to have, in either order."""
    u = rng.random()
    if u < 0.5:
        return f"{request}, {tail}"
    if u < 0.7:
        return f"{request}{rng.choice(('. ', ' - ', ' and '))}{tail}"
    return f"{tail}{rng.choice((', ', ': '))}{request}"


def phrase(rng: random.Random, text: str) -> str:
    """A request as people write it: with an opening, a closing, a capital, or without."""
    if rng.random() < 0.3:
        text = rng.choice(OPENINGS) + text
    if rng.random() < 0.25:
        text += rng.choice(CLOSINGS)
    elif rng.random() < 0.2:
        text += rng.choice(".?!")
    return text[0].upper() + text[1:] if rng.random() < 0.3 else text


def word(rng: random.Random) -> str:
    """A word of 3 to 8 letters: mostly pronounceable, now and then any letters."""
    if rng.random() < 0.2:
        return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 7)))
    syllables = (rng.choice(_CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 3)))
    text = "".join(syllables)
    if rng.random() < 0.4:
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice(_CONSONANTS + VOWELS) + text[at:]
    return text


def words(rng: random.Random) -> str:
    """Two to four words."""
    return " ".join(word(rng) for _ in range(rng.choice((2, 2, 3, 3, 4))))


def _word_or_two(rng: random.Random) -> str:
    return word(rng) if rng.random() < 0.8 else f"{word(rng)} {word(rng)}"


def number(rng: random.Random) -> str:
    """A number from 1 to 999, often one whose successor carries."""
    return str(rng.randint(1, 999) if rng.random() < 0.8 else 10 * rng.randint(1, 99) + 9)


def small_number(rng: random.Random) -> str:
    """A number from 1 to 99."""
    return str(rng.randint(1, 99))


def anything(rng: random.Random) -> str:
    """An operand of any kind: what styles wrap."""
    return rng.choice((word, word, words, number, _word_or_two))(rng)


def roman(number: int) -> str:
    """A number from 1 to 3999 in Roman numerals."""
    symbols = (
        *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC")),
        *((50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
    )
    out = ""
    for value, symbol in symbols:
        count, number = divmod(number, value)
        out += symbol * count
    return out


def _next_letter(c: str) -> str:
    if c not in string.ascii_lowercase:
        return c
    return string.ascii_lowercase[(string.ascii_lowercase.index(c) + 1) % 26]


_Row = tuple[str, Literal["operation", "style"], Callable[[random.Random], str]]
_ROWS: Mapping[str, tuple[_Row, Callable[[str], str]]] = {
    "reverse": (("Writes a word backwards.", "operation", word), lambda x: x[::-1]),
    "uppercase": (("Writes text in capital letters.", "operation", _word_or_two), str.upper),
    "double": (
        ("Doubles every letter of a word.", "operation", word),
        lambda x: "".join(c * 2 for c in x),
    ),
    "drop-vowels": (
        ("Removes the vowels of a word.", "operation", word),
        lambda x: "".join(c for c in x if c not in VOWELS),
    ),
    "caesar": (
        ("Moves every letter one place along the alphabet.", "operation", word),
        lambda x: "".join(map(_next_letter, x)),
    ),
    "successor": (
        ("Gives the number that follows.", "operation", number),
        lambda x: str(int(x) + 1),
    ),
    "roman": (
        ("Writes a number from 1 to 99 in Roman numerals.", "operation", small_number),
        lambda x: roman(int(x)),
    ),
    "swap-ends": (
        ("Swaps the first and the last letter of a word.", "operation", word),
        lambda x: x[-1] + x[1:-1] + x[0],
    ),
    "initials": (
        ("Gives the first letter of each word.", "operation", words),
        lambda x: "".join(w[0] for w in x.split()),
    ),
    "last-word": (("Gives the last word.", "operation", words), lambda x: x.split()[-1]),
    "drop-first": (("Leaves out the first letter.", "operation", word), lambda x: x[1:]),
    "json": (
        ("Answers as a JSON object.", "style", anything),
        lambda x: json.dumps({"answer": x}),
    ),
    "polite": (("Answers politely.", "style", anything), lambda x: f"Here you are: {x}."),
    "spell": (("Spells a word with hyphens.", "operation", word), "-".join),
    "brackets": (("Puts the answer in angle brackets.", "style", anything), lambda x: f"<{x}>"),
}

HELD_OUT: tuple[str, ...] = ("drop-first", "spell")
"""Tasks that the router's fitting never sees."""

LATE = "spell"
"""The held-out task whose adapter the demo registers while it runs."""

KNOWN: tuple[str, ...] = tuple(name for name in _ROWS if name not in HELD_OUT)
"""Tasks whose adapters are registered from the start."""


def _task(name: str) -> Task:
    (description, group, operand), apply = _ROWS[name]
    templates = split_templates(name, PATTERNS[name])
    return Task(
        name=name,
        description=description,
        group=group,
        operand=operand,
        apply=apply,
        train=templates["train"],
        test=templates["test"],
        tails=split_templates(f"{name}/tails", TAILS.get(name, ())),
    )


def split_templates(name: str, patterns: Sequence[str]) -> Mapping[Split, tuple[str, ...]]:
    """A fifth of the templates, three at least, is kept for testing."""
    templates = [t for pattern in patterns for t in expand(pattern)]
    random.Random(f"{name}/{_SPLIT_SEED}").shuffle(templates)
    held = max(3, len(templates) // 5)
    return {"train": tuple(templates[held:]), "test": tuple(templates[:held])}


OPERATIONS: tuple[str, ...] = tuple(n for n, (row, _) in _ROWS.items() if row[1] == "operation")
STYLES: tuple[str, ...] = tuple(n for n, (row, _) in _ROWS.items() if row[1] == "style")

TASKS: Mapping[str, Task] = MappingProxyType({name: _task(name) for name in _ROWS})
"""Every task by name; the order is that of the codes and of stacked adapters."""
