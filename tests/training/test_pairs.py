"""Pairs of an operation and a style: the split, the prompts, and what the base may see."""

from __future__ import annotations

import collections
import random
import re

import pytest

from router_training.demo.coded import CODES, WRAPPERS, CodedRows
from router_training.demo.near_domain import PATTERNS, near_domain
from router_training.demo.pairs import (
    HELD_OUT_PAIRS,
    PAIRS,
    TRAINED_PAIRS,
    pair_example,
    pair_examples,
)
from router_training.demo.paraphrases import expand
from router_training.demo.reworded import TEMPLATES, known_share, reworded_examples
from router_training.demo.tasks import OPERATIONS, STYLES, TASKS


def test_the_split_is_balanced():
    """Each operation misses one style, each style as many operations as the others, and no kind
    of operand misses a style altogether."""
    assert len(OPERATIONS) >= 12
    assert len(STYLES) >= 3
    assert sorted(o for o, _ in HELD_OUT_PAIRS) == sorted(OPERATIONS)
    counts = collections.Counter(s for _, s in HELD_OUT_PAIRS)
    assert set(counts.values()) == {len(OPERATIONS) // len(STYLES)}
    assert set(TRAINED_PAIRS) | set(HELD_OUT_PAIRS) == set(PAIRS)
    for operand in {TASKS[o].operand for o in OPERATIONS}:
        kind = [o for o in OPERATIONS if TASKS[o].operand is operand]
        styles = {s for o, s in TRAINED_PAIRS if o in kind}
        assert styles == set(STYLES) or len(kind) == 1


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_pairs_answer_is_the_style_of_the_operations_result(pair):
    """The operand stands in quotes; the answer follows from it alone."""
    for prompt, answer in pair_examples(pair, 3, 20):
        operand = prompt.split("'")[1]
        assert answer == TASKS[pair.style].apply(TASKS[pair.operation].apply(operand))


def test_pairs_of_the_test_split_use_templates_kept_for_testing():
    """Neither the request nor the tail of one is a training template."""
    pair = PAIRS[0]
    for prompt, _ in pair_examples(pair, 5, 40, "test"):
        text = re.sub("'[^']*'", "{x}", prompt).lower()
        assert any(t in text for t in TASKS[pair.operation].test)
        assert any(t in text for t in TASKS[pair.style].tails["test"])


def test_pair_prompts_depend_on_the_seed_alone():
    """The same arguments give the same prompts."""
    one, two = random.Random(4), random.Random(4)
    assert pair_example(one, PAIRS[7]) == pair_example(two, PAIRS[7])
    assert pair_examples(PAIRS[7], 1, 5) == pair_examples(PAIRS[7], 1, 5)


def test_every_task_is_asked_for_in_20_forms_or_more():
    """Templates for training and testing, without repetition."""
    for task in TASKS.values():
        forms = (*task.train, *task.test)
        assert len(set(forms)) == len(forms) >= 20
    for style in STYLES:
        tails = TASKS[style].tails
        assert len({*tails["train"], *tails["test"]}) >= 20


def test_a_base_can_be_made_that_never_sees_the_held_out_pairs():
    """Rows without them hold every other pair, and every operation in every wrapper."""
    names = {code: name for name, code in CODES.items()}
    rows = CodedRows(random.Random(0), HELD_OUT_PAIRS)
    seen = set()
    for _ in range(6000):
        found = [names[c] for c in re.findall(r"#[A-Z]", rows().prompt)]
        if len(found) == 2:
            seen.add(tuple(sorted(found, key=lambda n: n not in OPERATIONS)))
    dressed = {(o, w) for o in OPERATIONS for w in WRAPPERS}
    assert seen == set(TRAINED_PAIRS) | dressed


def test_a_wrapper_dresses_what_the_operation_gives():
    """Its form stands around the operation's result."""
    row = CodedRows(random.Random(0)).coded(("reverse", "round"))
    operand = row.prompt.split("'")[1]
    assert row.answer == f"({operand[::-1]})"


def test_near_domain_splits_ask_for_different_things():
    """No template of the one is a template of the other, nor of any task."""
    fit, test = ({t for p in PATTERNS[s] for t in expand(p)} for s in ("train", "test"))
    tasks = {t for task in TASKS.values() for t in (*task.train, *task.test)}
    assert not fit & test
    assert not (fit | test) & tasks
    assert near_domain(random.Random(1), "test") == near_domain(random.Random(1), "test")


def test_new_wordings_are_new():
    """None is a template, and every task has some of known and some of unknown words."""
    for name, task in TASKS.items():
        assert not set(TEMPLATES[name]) & {*task.train, *task.test}
        shares = [known_share(name, t) for t in TEMPLATES[name]]
        assert sum(s >= 0.5 for s in shares) >= 3
        assert sum(s == 0 for s in shares) >= 1
        for prompt, answer in reworded_examples(name, 2, 8, least=0.5):
            assert answer == task.apply(prompt.split("'")[1])


def test_known_words_count_in_their_inflections():
    """Function words do not count; "doubled" counts as known where "double" is."""
    assert known_share("double", "every letter of {x} doubled") == 1
    assert known_share("double", "stutter {x}") == 0
    assert known_share("double", "stutter the letters of {x}") == 0.5
