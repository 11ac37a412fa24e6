"""The tasks that come later: right answers, and requests that no demo task has."""

from __future__ import annotations

import random
import string

from hypothesis import given
from hypothesis import strategies as st

from router_training.demo.new_tasks import NEW_TASKS
from router_training.demo.tasks import TASKS

WORDS = st.text(string.ascii_lowercase, min_size=2, max_size=10)


@given(WORDS)
def test_words_are_turned_as_each_task_says(word):
    """Each task agrees with what the demo's tasks make of the same word."""
    old = {name: task.apply for name, task in TASKS.items()}
    new = {name: task.apply for name, task in NEW_TASKS.items()}
    assert new["drop-last"](word) == old["reverse"](old["drop-first"](old["reverse"](word)))
    assert new["reverse-spell"](word) == old["spell"](old["reverse"](word))
    assert new["double-caps"](word) == old["uppercase"](old["double"](word))
    assert old["caesar"](new["caesar-back"](word)) == word
    assert old["drop-first"](old["reverse"](new["last-twice"](word))) == old["reverse"](word)


@given(st.lists(WORDS, min_size=2, max_size=4))
def test_words_are_picked_as_each_task_says(parts):
    """The first word, and the initials in capitals."""
    phrase = " ".join(parts)
    assert NEW_TASKS["first-word"].apply(phrase) == parts[0]
    assert NEW_TASKS["upper-initials"].apply(phrase) == TASKS["initials"].apply(phrase).upper()


@given(st.integers(1, 999))
def test_the_number_before(number):
    """The predecessor's successor is the number."""
    before = NEW_TASKS["predecessor"].apply(str(number))
    assert TASKS["successor"].apply(before) == str(number)


def test_templates_are_the_tasks_own():
    """No template is another task's, none is in both splits, and there are enough of them."""
    known = [t for task in TASKS.values() for t in (*task.train, *task.test)]
    new = [t for task in NEW_TASKS.values() for t in (*task.train, *task.test)]
    assert len({*known, *new}) == len(set(known)) + len(new)
    assert all(len(task.train) >= 5 and len(task.test) >= 3 for task in NEW_TASKS.values())


def test_operands_are_quoted_and_answers_differ():
    """Every prompt quotes its operand, and no answer is an echo of it."""
    rng = random.Random(0)
    for task in NEW_TASKS.values():
        for split in ("train", "test"):
            prompt, answer = task.example(rng, split)
            operand = prompt.split("'")[1]
            assert answer == task.apply(operand) != operand
