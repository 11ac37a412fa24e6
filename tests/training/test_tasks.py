"""The demo's tasks: right answers, disjoint templates, the same prompts from the same seed."""

from __future__ import annotations

import json
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_training.demo.paraphrases import PATTERNS, expand
from router_training.demo.tasks import HELD_OUT, KNOWN, LATE, TASKS, roman

WORDS = st.text(string.ascii_lowercase, min_size=2, max_size=10)
PHRASES = st.lists(WORDS, min_size=2, max_size=4)
NAMES = sorted(TASKS)


def quoted(prompt: str) -> str:
    return prompt.split("'")[1]


@given(WORDS)
def test_letters_are_turned_as_each_task_says(word):
    """Each task on words agrees with another statement of what it does."""
    n = len(word)
    assert all(TASKS["reverse"].apply(word)[i] == word[n - 1 - i] for i in range(n))
    assert TASKS["double"].apply(word)[::2] == TASKS["double"].apply(word)[1::2] == word
    assert TASKS["uppercase"].apply(word).lower() == word
    assert TASKS["uppercase"].apply(word).isupper()
    kept = TASKS["drop-vowels"].apply(word)
    assert not set(kept) & set("aeiou")
    assert len(kept) == n - sum(word.count(v) for v in "aeiou")
    shifted = TASKS["caesar"].apply(word)
    assert all((ord(b) - ord(a)) % 26 == 1 for a, b in zip(word, shifted, strict=True))
    swapped = TASKS["swap-ends"].apply(word)
    assert (swapped[0], swapped[1:-1], swapped[-1]) == (word[-1], word[1:-1], word[0])
    assert TASKS["spell"].apply(word).split("-") == list(word)


@given(PHRASES)
def test_words_are_picked_as_each_task_says(parts):
    """Initials and the last word of a phrase."""
    phrase = " ".join(parts)
    assert list(TASKS["initials"].apply(phrase)) == [p[0] for p in parts]
    assert phrase.endswith(" " + TASKS["last-word"].apply(phrase))


@given(st.text(string.ascii_letters + string.digits + " ", min_size=1))
def test_styles_keep_the_text(text):
    """A style adds around the text and changes nothing in it."""
    assert json.loads(TASKS["json"].apply(text)) == {"answer": text}
    assert TASKS["brackets"].apply(text)[1:-1] == text
    assert text in TASKS["polite"].apply(text)


@given(st.integers(1, 3999))
def test_roman_numerals_add_up(number):
    """A smaller symbol before a larger one is subtracted; nothing repeats four times."""
    values = [
        {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}[c] for c in roman(number)
    ]
    total = sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))
    assert total == number
    assert not any(c * 4 in roman(number) for c in "IVXLCDM")


@given(st.integers(0, 10**6))
def test_successor_counts(number):
    """The number that follows."""
    assert int(TASKS["successor"].apply(str(number))) - number == 1


@pytest.mark.parametrize("name", NAMES)
def test_examples_hold_the_operand_and_its_answer(name):
    """A prompt quotes one operand; the answer is the task's, never an echo, never empty."""
    task = TASKS[name]
    for split in ("train", "test"):
        for prompt, answer in task.examples(3, 40, split):
            assert prompt.count("'") == 2
            assert answer == task.apply(quoted(prompt))
            assert answer not in ("", quoted(prompt))


@pytest.mark.parametrize("name", NAMES)
def test_templates_are_many_and_split(name):
    """Twenty paraphrases and more a task; none serves both training and testing."""
    task = TASKS[name]
    assert len({*task.train, *task.test}) == len(task.train) + len(task.test) >= 20
    assert len(task.test) >= 3
    for other in NAMES:
        if other != name:
            assert not {*task.train, *task.test} & {*TASKS[other].train, *TASKS[other].test}


@pytest.mark.parametrize("name", NAMES)
def test_seeds_decide_everything(name):
    """The same seed gives the same prompts, another seed others."""
    task = TASKS[name]
    first = task.examples(1, 20)
    assert first == task.examples(1, 20)
    assert len(dict(first)) == 20
    assert first != task.examples(2, 20)
    assert task.example(random.Random(5)) == task.example(random.Random(5))


def test_known_and_held_out_partition_the_tasks():
    """Every task is either known to the router's fitting or held out; the late one is held out."""
    assert set(KNOWN) | set(HELD_OUT) == set(TASKS) == set(PATTERNS)
    assert not set(KNOWN) & set(HELD_OUT)
    assert LATE in HELD_OUT


@pytest.mark.parametrize(
    ("pattern", "templates"),
    [
        ("turn {x} [around|over]", ["turn {x} around", "turn {x} over"]),
        ("[a|b] {x} [c|]", ["a {x} c", "a {x} ", "b {x} c", "b {x} "]),
        ("plain {x}", ["plain {x}"]),
    ],
)
def test_patterns_expand_to_every_choice(pattern, templates):
    """One template for each combination of choices."""
    assert expand(pattern) == templates
