"""Baselines that need no model, on prompts that are easy to tell apart."""

from __future__ import annotations

import numpy as np
import pytest

from mora_serve.router.features import NGrams
from router_training.baselines.classifiers import centroids, logistic_regression, perceptron
from router_training.demo.suite import demo_suite, fitting_data
from router_training.evaluation.cases import texts

NAMES = ("reverse", "uppercase", "roman")
FEATURES = NGrams(dim=512)
METHODS = {
    "centroids": centroids(FEATURES),
    "logistic": logistic_regression(FEATURES),
    "perceptron": perceptron(FEATURES),
}


@pytest.fixture(scope="module")
def data():
    return fitting_data(NAMES, prompts=24)


@pytest.fixture(scope="module")
def cases():
    suite = demo_suite(prompts=8)
    return [case for case in suite.trained_templates if case.adapters[0] in (*NAMES, "spell")]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_known_adapters_are_found(method, data, cases):
    """Most prompts go to the right one; one always runs, and its score stands for how sure."""
    known = [case for case in cases if case.adapters[0] in NAMES]
    scored = method(data).register({name: ["unused"] for name in NAMES})(texts(known))
    assert (scored.ranking.argmax(1) == scored.truth(known)).mean() > 0.85
    assert [c[0] for c in scored.chosen] == [scored.names[i] for i in scored.ranking.argmax(1)]
    assert np.array_equal(scored.inside, scored.ranking.max(1))
    if scored.probability is not None:
        assert np.array_equal(scored.probability, scored.ranking)
        assert ((scored.probability >= 0) & (scored.probability <= 1)).all()


@pytest.mark.parametrize("name", ["logistic", "perceptron"])
def test_prompts_for_two_and_for_none_are_learnt_too(name):
    """Those for two make both adapters likely, those for none make none likely."""
    names = ("reverse", "uppercase", "json")
    data = fitting_data(names, prompts=24)
    score = METHODS[name](data).register({name: ["unused"] for name in names})
    assert {case.adapters for case in data.pairs} >= {("reverse", "json")}
    both = score(texts(data.pairs))
    assert (both.probability[both.wanted(data.pairs)] > 0.5).mean() > 0.8
    assert (both.probability[~both.wanted(data.pairs)] < 0.5).mean() > 0.8
    for prompts in (data.near, data.far):
        assert (score(prompts).probability.max(1) < 0.5).mean() > 0.9


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_newcomer_is_known_by_its_card(method, data, cases):
    """Its few prompts are what it is told by; the others keep all of theirs."""
    spell = texts(fitting_data(("spell",), prompts=16).examples["spell"])
    cards = {**{name: ["unused"] for name in NAMES}, "spell": spell}
    scored = method(data).register(cards)(texts(cases))
    assert scored.names == (*NAMES, "spell")
    hits = scored.ranking.argmax(1) == scored.truth(cases)
    of_spell = np.array([case.adapters == ("spell",) for case in cases])
    assert hits[of_spell].mean() > 0.5
    assert hits[~of_spell].mean() > 0.8
