"""``examples.json``: what the demo shows, chosen among prompts that the models get right."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from router_training.batched import Log
from router_training.demo.loaded import LoadedBundle
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.pairs import HELD_OUT_PAIRS, TRAINED_PAIRS, Pair
from router_training.demo.tasks import KNOWN, LATE, TASKS

FILE = "examples.json"
TRIED = 24

_WORDS = ("modular", "garden", "banana", "kavo", "planet", "silver", "window", "lemon", "robot")
_PHRASES = ("modular open runtime adapter", "very large array", "low rank adapter", "blue moon")
_NUMBERS = ("47", "9", "24", "88", "36", "14")
_OPERANDS = {
    **dict.fromkeys(("initials", "last-word"), _PHRASES),
    **dict.fromkeys(("successor", "roman"), _NUMBERS),
}
_SYSTEM = "you are the assistant of a small shop"


def write_examples(bundle: Path, log: Log) -> None:
    """Choose the demo's examples and write them into the bundle.

    An example is taken only if the right adapter is routed to and the answer is right, in fp32
    and in bf16: the demo shows what the models can do, the card says how often they can.
    """
    chooser = _Chooser([LoadedBundle(bundle), LoadedBundle(bundle, "bf16")])
    examples = list(chooser.all())
    log(f"examples: {len(examples)} chosen")
    (bundle / FILE).write_text(json.dumps(examples, indent=1, ensure_ascii=False) + "\n")


_Turns = tuple[tuple[str, str], ...]


class _Case(NamedTuple):
    prompt: str
    answer: str
    mixture: tuple[str, ...]


class _Chooser:
    def __init__(self, models: Sequence[LoadedBundle]) -> None:
        self._models = models

    def all(self) -> Iterator[dict[str, Any]]:
        routed = {name: self._routed(name) for name in (*KNOWN, LATE)}
        for name in KNOWN:
            if example := routed[name]:
                yield {"kind": "auto", **example}
        rng = random.Random("examples")
        outside = (out_of_domain(rng, "test") for _ in range(200))
        declined = [p for p in outside if not any(m.route(p).adapters for m in self._models)]
        yield from ({"kind": "abstain", "prompt": prompt} for prompt in declined[:2])
        if example := routed["roman"]:
            yield {"kind": "task", **example}
        if example := self._pair(TRAINED_PAIRS):
            yield {"kind": "mixture", **example}
        if example := self._pair(HELD_OUT_PAIRS, routed=True):
            yield {"kind": "auto", **example}
        if example := routed["reverse"]:
            yield {"kind": "base", "prompt": example["prompt"]}
        if example := self._routed("last-word", (("system", _SYSTEM),)):
            yield {"kind": "chat", **example, "turns": [["system", _SYSTEM]]}
        if example := routed[LATE]:
            yield {"kind": "late", **example}

    def _routed(self, name: str, turns: _Turns = ()) -> dict[str, Any] | None:
        task = TASKS[name]
        cases = []
        for operand, template in _diagonal(_OPERANDS.get(name, _WORDS), (*task.test, *task.train)):
            prompt = template.format(x=f"'{operand}'")
            if all(model.route(prompt).adapters == (name,) for model in self._models):
                cases.append(_Case(prompt, task.apply(operand), (name,)))
        case = self._first_right(cases, turns)
        return case and {"prompt": case.prompt, "adapter": name, "answer": case.answer}

    def _pair(self, pairs: Sequence[Pair], *, routed: bool = False) -> dict[str, Any] | None:
        """An operation and a style at weight 1, both from the start; ``routed``: picked so too."""
        cases = []
        for pair in pairs:
            if LATE in pair:
                continue
            operation, style = TASKS[pair.operation], TASKS[pair.style]
            for operand, request in _diagonal(
                _OPERANDS.get(pair.operation, _WORDS), operation.train, 4
            ):
                asked = request.format(x=f"'{operand}'")
                answer = style.apply(operation.apply(operand))
                prompt = f"{asked}, {style.tails['train'][0]}"
                if not routed or all(
                    set(m.route(prompt).adapters) == set(pair) for m in self._models
                ):
                    cases.append(_Case(prompt, answer, tuple(pair)))
        case = self._first_right(cases)
        return case and {
            "prompt": case.prompt,
            "answer": case.answer,
            "mixture": dict.fromkeys(case.mixture, 1.0),
        }

    def _first_right(self, cases: Sequence[_Case], turns: _Turns = ()) -> _Case | None:
        for model in self._models:
            if not cases:
                return None
            texts = model.answers(
                [model.base.tokenizer.chat([*turns, ("user", c.prompt)]) for c in cases],
                [c.mixture for c in cases],
                2 + max(len(c.answer) for c in cases),
            )
            cases = [c for c, text in zip(cases, texts, strict=True) if text == c.answer]
        return cases[0] if cases else None


def _diagonal(
    operands: Sequence[str], templates: Sequence[str], count: int = TRIED
) -> Iterator[tuple[str, str]]:
    """``count`` pairs in an order that changes both."""
    for i in range(count):
        yield operands[i % len(operands)], templates[(i + i // len(operands)) % len(templates)]
