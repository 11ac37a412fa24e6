"""Prompts that ask for an operation and a style, and which of these pairs no training sees."""

from __future__ import annotations

import random
from typing import NamedTuple

from router_training.demo.tasks import (
    OPERATIONS,
    STYLES,
    TASKS,
    Split,
    join,
    number,
    phrase,
    small_number,
    words,
)


class Pair(NamedTuple):
    """An operation, and the style that dresses its result."""

    operation: str
    style: str


PAIRS: tuple[Pair, ...] = tuple(Pair(o, s) for o in OPERATIONS for s in STYLES)


def _held_out() -> tuple[Pair, ...]:
    def kind(operation: str) -> int:
        operand = TASKS[operation].operand
        return 0 if operand in (number, small_number) else 1 if operand is words else 2

    by_kind = sorted(OPERATIONS, key=kind)
    return tuple(Pair(o, STYLES[i % len(STYLES)]) for i, o in enumerate(by_kind))


HELD_OUT_PAIRS: tuple[Pair, ...] = _held_out()
"""One style of each operation, never trained with it. Every style misses equally many
operations, and no kind of operand (numbers, several words, one word) misses a style altogether."""

TRAINED_PAIRS: tuple[Pair, ...] = tuple(p for p in PAIRS if p not in HELD_OUT_PAIRS)


def pair_example(rng: random.Random, pair: Pair, templates: Split = "train") -> tuple[str, str]:
    """(prompt, answer): the style's form of the operation's result."""
    operation, style = TASKS[pair.operation], TASKS[pair.style]
    x = operation.draw(rng)
    request = operation.request(rng, x, templates)
    prompt = phrase(rng, join(rng, request, rng.choice(style.tails[templates])))
    return prompt, style.apply(operation.apply(x))


def pair_examples(
    pair: Pair, seed: int, count: int, templates: Split = "train"
) -> list[tuple[str, str]]:
    """``count`` distinct prompts and their answers; the same for the same arguments."""
    rng = random.Random(f"{pair.operation}+{pair.style}/{templates}/{seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        prompt, answer = pair_example(rng, pair, templates)
        found[prompt] = answer
    return list(found.items())


def three_way_examples(
    pair: Pair, outer: str, seed: int, count: int, templates: Split = "train"
) -> list[tuple[str, str]]:
    """Prompts for a pair and then another style, which dresses the pair's answer."""
    rng = random.Random(f"{pair.operation}+{pair.style}+{outer}/{seed}")
    style = TASKS[outer]
    return [
        (f"{prompt}, then {rng.choice(style.tails[templates])}", style.apply(answer))
        for prompt, answer in pair_examples(pair, seed, count, templates)
    ]
