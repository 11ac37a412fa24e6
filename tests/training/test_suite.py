"""The demo's suite: fresh prompts of every kind, apart from all that anything is fitted on."""

from __future__ import annotations

import re

import pytest

from router_training.demo.pairs import HELD_OUT_PAIRS, PAIRS, Pair, three_way_examples
from router_training.demo.reworded import known_share
from router_training.demo.suite import demo_suite, fitting_data
from router_training.demo.tasks import TASKS
from router_training.evaluation.cases import by_adapter, texts


@pytest.fixture(scope="module")
def suite():
    return demo_suite(prompts=6)


def test_every_kind_has_its_prompts(suite):
    """So many a task and pair; of nobody's, eight times as many."""
    for cases in (suite.trained_templates, suite.kept_templates, suite.reworded, suite.new_words):
        assert {len(at) for at in by_adapter(cases).values()} == {6}
        assert len(by_adapter(cases)) == len(TASKS)
    assert set(by_adapter(suite.pairs.both())) == set(map(tuple, PAIRS))
    assert set(by_adapter(suite.pairs_kept.held_out)) == set(map(tuple, HELD_OUT_PAIRS))
    assert len(suite.near) == len(suite.far) == 48
    assert not any(case.adapters for case in (*suite.near, *suite.far))


def test_the_same_seed_gives_the_same_suite(suite):
    """And another one other prompts."""
    assert demo_suite(prompts=6) == suite
    assert demo_suite(5, prompts=6).kept_templates != suite.kept_templates


def test_kept_templates_are_in_no_fitting(suite):
    """Nor does any held-out pair stand in the fitting's pairs."""
    data = fitting_data(tuple(TASKS), prompts=30)
    fitted = {re.sub("'.*'", "{x}", p) for cases in data.examples.values() for p in texts(cases)}
    kept = {name: set(TASKS[name].test) for name in TASKS}
    for name, templates in kept.items():
        assert not fitted & templates, name
    assert not set(by_adapter(data.pairs)) & set(map(tuple, HELD_OUT_PAIRS))
    assert not {*texts(suite.kept_templates)} & {*texts(data.pairs), *fitted}


def test_wordings_are_sorted_by_what_is_known_of_them(suite):
    """At least half of the content words of a reworded prompt are known, less of a new one."""
    for cases, known in ((suite.reworded, True), (suite.new_words, False)):
        for case in cases:
            template = re.sub("'.*'", "{x}", case.prompt)
            if known:
                assert known_share(case.adapters[0], template) > 0
    assert not {*texts(suite.reworded)} & {*texts(suite.new_words)}


@pytest.mark.parametrize("outer", ["polite", "brackets"])
def test_three_way_answers_are_dressed_twice(outer):
    """The style named last goes around the pair's answer."""
    pair = Pair("uppercase", "json")
    for prompt, answer in three_way_examples(pair, outer, 1, 5):
        operand = prompt.split("'")[1]
        inner = TASKS["json"].apply(operand.upper())
        assert answer == TASKS[outer].apply(inner)
        assert ", then " in prompt


def test_fitting_data_leaves_out_what_is_not_named():
    """Pairs of other adapters are not in it."""
    data = fitting_data(("reverse", "json"), prompts=8)
    assert set(data.examples) == {"reverse", "json"}
    assert {case.adapters for case in data.pairs} <= {("reverse", "json")}
    assert len(data.near) == len(data.far) == 32
