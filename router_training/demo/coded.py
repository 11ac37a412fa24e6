"""Rows for pre-training the base: tasks named by a code, anywhere in random words.

The base learns every task's circuit under a code ("#C" for one of them) and no paraphrase at
all, so that an adapter has only to learn which words mean which code.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.pairs import PAIRS, Pair
from router_training.demo.paraphrases import CLOSINGS, ECHOES, OPENINGS, PATTERNS, TAILS, expand
from router_training.demo.tasks import OPERATIONS, STYLES, TASKS, anything

WRAPPERS: Mapping[str, str] = {
    "stars": "*{}*",
    "round": "({})",
    "tilde": "~ {}",
    "exclaim": "{}!",
    "so": "so: {}",
    "done": "{} / done",
}
"""Styles that the base knows by a code and no adapter asks for.

With them, the base learns to dress whatever an operation gives: from three styles, it learns some
of their pairs by heart.
"""

CODES = {name: f"#{chr(ord('A') + i)}" for i, name in enumerate((*TASKS, *WRAPPERS))}
REPLY = "I only know small text tasks."


@dataclass(frozen=True)
class Row:
    """One training row; ``ahead`` holds earlier (role, text) turns that do not matter."""

    prompt: str
    answer: str
    ahead: tuple[tuple[str, str], ...] = field(default=())


def vocabulary() -> tuple[str, ...]:
    """Every word that occurs in a request, an opening or a closing, sorted."""
    patterns = [p for ps in (*PATTERNS.values(), *TAILS.values()) for p in ps]
    texts = [t for p in patterns for t in expand(p)] + [*ECHOES, *OPENINGS, *CLOSINGS]
    found = {w for t in texts for w in re.findall(r"[a-z0-9]+", t.replace("{x}", " "))}
    return tuple(sorted(found))


class CodedRows:
    """Draws pre-training rows from one random generator; no row has an ``excluded`` pair."""

    def __init__(self, rng: random.Random, excluded: Collection[Pair] = ()) -> None:
        self._rng = rng
        self._words = vocabulary()
        self._pairs = tuple(p for p in PAIRS if p not in excluded)

    def __call__(self) -> Row:
        """15 % echo, 30 % operations, 10 % styles, 39 % pairs of codes, 6 % prose.

        Of the styles, alone and in pairs, a third are wrappers.
        """
        rng = self._rng
        u = rng.random()
        if u < 0.15:
            row = self.coded(())
        elif u < 0.45:
            row = self.coded((rng.choice(OPERATIONS),))
        elif u < 0.55:
            row = self.coded((self._wrapper() or rng.choice(STYLES),))
        elif u < 0.94:
            wrapper = self._wrapper()
            pair = (rng.choice(OPERATIONS), wrapper) if wrapper else rng.choice(self._pairs)
            row = self.coded(pair)
        else:
            row = Row(out_of_domain(rng), REPLY)
        return Row(row.prompt, row.answer, earlier_turns(rng))

    def coded(self, names: tuple[str, ...]) -> Row:
        """A row for these tasks, applied in order; none is an echo of the operand."""
        rng = self._rng
        task = TASKS.get(names[0]) if names else None
        x = answer = task.draw(rng) if task else anything(rng)
        for name in names:
            wrapper = WRAPPERS.get(name)
            answer = wrapper.format(answer) if wrapper else TASKS[name].apply(answer)
        codes = [CODES[n] for n in names]
        rng.shuffle(codes)
        if rng.random() < 0.15:
            return Row(" ".join([*codes, f"'{x}'"]), answer)
        return Row(self._carrier(x, codes), answer)

    def _wrapper(self) -> str:
        return self._rng.choice(tuple(WRAPPERS)) if self._rng.random() < 1 / 3 else ""

    def _carrier(self, x: str, codes: list[str]) -> str:
        rng = self._rng
        before, after = self._some(4), self._some(3)
        clause = self._some(3) if rng.random() < 0.5 else []
        if after and rng.random() < 0.2:
            after[-1] += rng.choice("?.!")
        if before and rng.random() < 0.15:
            before[-1] += rng.choice(":,")
        parts = [*before, f"'{x}'", *after]
        if clause and rng.random() < 0.6:
            parts[-1] += rng.choice((",", ".", ",", ",", " -"))
            parts += clause
        elif clause:
            clause[-1] += rng.choice(",:")
            parts = clause + parts
        for code in codes:
            parts.insert(rng.choice((0, len(parts), rng.randint(0, len(parts)))), code)
        text = " ".join(parts)
        return text[0].upper() + text[1:] if rng.random() < 0.3 else text

    def _some(self, most: int) -> list[str]:
        return [self._rng.choice(self._words) for _ in range(self._rng.randint(0, most))]


def earlier_turns(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Mostly none; 2.5 % a system turn, 1.5 % an earlier exchange, ahead of the prompt."""
    u = rng.random()
    if u < 0.025:
        return (("system", out_of_domain(rng)),)
    if u < 0.04:
        return (("user", out_of_domain(rng)), ("assistant", REPLY))
    return ()
