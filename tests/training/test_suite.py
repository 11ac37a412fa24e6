"""The demo's suite: fresh prompts of every kind, apart from all that anything is fitted on."""

from __future__ import annotations

import re

import pytest

from mora_serve.errors import InvalidArgument
from router_training.demo.pairs import (
    HELD_OUT_PAIRS,
    PAIRS,
    TRAINED_PAIRS,
    Pair,
    three_way_examples,
)
from router_training.demo.reworded import TEMPLATES, known_share
from router_training.demo.routing import RouterRecipe, demo_data
from router_training.demo.suite import FRESH_SEED, demo_suite, fitting_data
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
    assert demo_suite(FRESH_SEED + 5, prompts=6).kept_templates != suite.kept_templates


@pytest.mark.parametrize("seed", [0, 1, FRESH_SEED - 1])
def test_a_seed_that_a_fitting_may_have_is_refused(seed):
    """Its prompts may be the very ones that the router was fitted on."""
    with pytest.raises(InvalidArgument, match=rf"seed: {seed} .*give {FRESH_SEED} or more") as e:
        demo_suite(seed, prompts=1)
    assert e.value.field == "seed"


def labelled_by_the_suite():
    data = fitting_data(tuple(TASKS), prompts=30)
    singles = [case for cases in data.examples.values() for case in cases]
    return [(case.prompt, case.adapters) for case in (*singles, *data.pairs)]


def labelled_by_the_demo():
    data = demo_data(RouterRecipe(prompts=30), tuple(TASKS))
    return [(row.prompt, row.adapters) for row in data.labelled]


@pytest.mark.parametrize("fitting", [labelled_by_the_suite, labelled_by_the_demo])
def test_kept_templates_are_in_no_fitting(fitting, suite):
    """Nor does any held-out pair stand in it: not where a router is fitted again to be measured,
    and not where the demo's own is."""
    labelled = fitting()
    fitted = {bare(prompt) for prompt, adapters in labelled if len(adapters) == 1}
    assert len({adapters for _, adapters in labelled}) == len(TASKS) + len(TRAINED_PAIRS)
    for name, task in TASKS.items():
        assert not fitted & {template.lower() for template in task.test}, name
        assert fitted & {template.lower() for template in task.train}, name
    assert not {adapters for _, adapters in labelled} & set(map(tuple, HELD_OUT_PAIRS))
    fresh = (*suite.kept_templates, *suite.pairs_kept.both())
    assert not {*texts(fresh)} & {prompt for prompt, _ in labelled}


def bare(prompt):
    """With a place for the operand."""
    return re.sub("'.*'", "{x}", prompt).lower()


def template_of(case):
    """The sentence without its operand and without what is said around any prompt."""
    (name,), prompt = case.adapters, case.prompt.lower()
    operand = re.search("'.*'", prompt).group()
    return max((t for t in TEMPLATES[name] if t.format(x=operand) in prompt), key=len)


def test_wordings_are_sorted_by_what_is_known_of_them(suite):
    """At least half of the content words of a reworded prompt are known, less of a new one."""
    for cases, known in ((suite.reworded, True), (suite.new_words, False)):
        for case in cases:
            share = known_share(case.adapters[0], template_of(case))
            assert (share >= 0.5) == known, (case.prompt, share)
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
