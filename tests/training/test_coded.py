"""Rows for the base's pre-training, and the prompts that belong to no task."""

from __future__ import annotations

import random
import re

from router_training.demo.coded import (
    CODES,
    REPLY,
    WRAPPERS,
    CodedRows,
    Row,
    earlier_turns,
    vocabulary,
)
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import TASKS


def draws(seed: int, count: int) -> list[Row]:
    rows = CodedRows(random.Random(seed))
    return [rows() for _ in range(count)]


def group(name: str) -> str:
    return "style" if name in WRAPPERS else TASKS[name].group


def apply(name: str, value: str) -> str:
    return WRAPPERS[name].format(value) if name in WRAPPERS else TASKS[name].apply(value)


def test_codes_say_what_the_answer_is():
    """Applying the tasks that the codes name, operations before styles, gives the answer."""
    names = {code: name for name, code in CODES.items()}
    kinds = set()
    for row in draws(0, 800):
        if row.answer == REPLY:
            continue
        value = row.prompt.split("'")[1]
        found = [names[c] for c in re.findall(r"#[A-Z]", row.prompt)]
        for name in sorted(found, key=group):
            value = apply(name, value)
        assert value == row.answer
        kinds.add(tuple(group(n) for n in sorted(found, key=group)))
    assert kinds == {(), ("operation",), ("style",), ("operation", "style")}


def test_no_row_is_a_paraphrase():
    """The base never sees a template: words around the operand are drawn at random."""
    templates = [t for task in TASKS.values() for t in (*task.train, *task.test) if len(t) > 12]
    for row in draws(1, 400):
        text = re.sub(r"'[^']*'", "{x}", row.prompt)
        assert "#" in text or not any(t == text for t in templates)


def test_rows_depend_on_the_seed_alone():
    """The same seed gives the same rows."""
    assert draws(7, 50) == draws(7, 50) != draws(8, 50)


def test_vocabulary_holds_words_of_every_task():
    """Words of the templates, without the operand's place."""
    words = vocabulary()
    assert {"backwards", "roman", "chevrons", "thanks"} <= set(words)
    assert "x" not in words
    assert list(words) == sorted(set(words))


def test_earlier_turns_are_rare_and_alternate():
    """A few rows have a system turn or one whole exchange ahead."""
    rng = random.Random(0)
    ahead = [earlier_turns(rng) for _ in range(4000)]
    shapes = {tuple(role for role, _ in turns) for turns in ahead}
    assert shapes == {(), ("system",), ("user", "assistant")}
    assert 0.02 < sum(map(bool, ahead)) / len(ahead) < 0.06


def test_out_of_domain_splits_share_no_prompt():
    """Fitting and testing draw from different generators, each decided by its seed."""
    fit, test = (
        {out_of_domain(rng, split) for rng in [random.Random(0)] for _ in range(2000)}
        for split in ("train", "test")
    )
    assert not fit & test
    assert min(len(fit), len(test)) > 300
    words = [
        {w for p in prompts for w in re.findall(r"[a-z]{5,}", p.lower())} for prompts in (fit, test)
    ]
    assert len(words[0] & words[1]) <= 3
    assert out_of_domain(random.Random(3), "test") == out_of_domain(random.Random(3), "test")
