"""Quality: what counts as right, what mixtures are tried, and that nothing is generated twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mora_serve.model.stacked import StackedAdapters
from router_training.evaluation.answers import Answering
from router_training.evaluation.cases import Case, PairCases
from router_training.evaluation.quality import (
    beside_wrong,
    own_mixtures,
    pair_baselines,
    ratio,
    routed_mixtures,
)
from router_training.generation import greedy

NAMES = ("a", "b", "c")


class Rule:
    """A model that is right about a case when the rule says so of its mixture."""

    names = NAMES

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def right(self, cases, mixtures, system=""):
        self.asked += mixtures
        return np.array([float(self.rule(c, m)) for c, m in zip(cases, mixtures, strict=True)])


def exactly(case, mixture):
    return {n for n, w in mixture.items() if w >= 1} == set(case.adapters)


PAIRS = PairCases(
    [Case(str(i), ("a", "b")) for i in range(10)], [Case(str(i), ("b", "c")) for i in range(10)]
)


def test_the_right_pair_beats_what_needs_no_router():
    """A model that needs just the two is right under no other mixture but a lucky random one."""
    found = pair_baselines(PAIRS, Rule(exactly), seed=0)
    assert found["right_pair"] == {"mean": 1.0, "trained": 1.0, "held_out": 1.0}
    for name in ("best_single", "uniform", "uniform_full", "base"):
        assert found[name]["mean"] == 0.0
    assert found["random_pair"]["mean"] < 1.0
    assert (found["prompts"], found["prompts_a_pair"]) == (16, 8)


def test_the_best_single_adapter_is_the_best_of_each_pair():
    """Each pair has its own; the highest of any pair is told too."""
    found = pair_baselines(PAIRS, Rule(lambda case, mixture: set(mixture) == {"a"}), seed=0)
    assert found["best_single"]["mean"] == 1.0
    half = Rule(lambda case, mixture: "a" in case.adapters and set(mixture) == {"b"})
    found = pair_baselines(PAIRS, half, seed=0)
    assert found["best_single"] == {"mean": 0.5, "trained": 1.0, "held_out": 0.0}
    assert found["best_single_highest"] == 1.0


def test_every_other_adapter_stands_beside_the_right_one():
    """At the weight given, each in turn; what is kept is the ratio of the exact matches."""
    cases = [Case(str(i), (name,)) for i in range(4) for name in NAMES]
    model = Rule(lambda case, mixture: "c" not in mixture or case.adapters == ("c",))
    found = beside_wrong(cases, model, 0.25)
    beside = [m for m in model.asked if len(m) == 2]
    assert len(beside) == len(cases)
    for name in NAMES:
        mine = [m for m in beside if m.get(name) == 1.0]
        assert {n for m in mine for n in m} == set(NAMES)
        assert all(w == 0.25 for m in mine for n, w in m.items() if n != name)
    assert found["by_adapter"]["a"] == {"alone": 1.0, "beside": 0.5}
    assert found["by_adapter"]["c"] == {"alone": 1.0, "beside": 1.0}
    assert found["kept"] == pytest.approx(2 / 3, abs=1e-3)


def test_a_share_of_nothing_is_nothing():
    """No right answer to keep, none kept."""
    assert ratio(0.0, 0.0) == 0.0
    assert ratio(1.0, 4.0) == 0.25


def test_routed_mixtures_are_what_the_router_picks(scorer, cases):
    """At weight 1 each."""
    mixtures = routed_mixtures(scorer, cases)
    assert mixtures == [dict.fromkeys(scorer.route(case.prompt).adapters, 1.0) for case in cases]


@pytest.fixture(scope="module")
def adapters(base):
    torch.manual_seed(0)
    stacked = StackedAdapters(base.shape, 3, 4, 8.0).requires_grad_(False)
    for b in stacked.b.values():
        b.normal_(0, 0.5)
    return stacked


def truth(base, adapters, prompt, mixture, limit=6):
    """The answer as the decoder generates it alone."""
    ids = [base.tokenizer.chat([("user", prompt)])]
    weights = torch.tensor([[mixture.get(name, 0.0) for name in NAMES]])
    found = greedy(base.decoder, ids, base.tokenizer.eos_ids, limit, adapters, weights)
    return base.tokenizer.decode(found[0])


def test_an_answer_is_right_when_all_of_it_is(base, adapters):
    """Under its mixture; a longer, a shorter or another answer is wrong."""
    model = Answering(base, adapters, NAMES)
    mixture = {"a": 1.0, "c": 0.5}
    text = truth(base, adapters, "hello", mixture)
    long = text + "x"
    answers = [long[:-1], long, "nothing like it"]
    found = model.right([Case("hello", ("a",), a) for a in answers], [mixture] * 3)
    stops = truth(base, adapters, "hello", mixture, 60) == text
    assert found.tolist() == [float(stops), 0.0, 0.0]


def test_an_answer_that_ends_is_found_right(base, adapters):
    """An end right after the wanted text makes it the whole answer."""
    first = truth(base, adapters, "hello", {"b": 1.0}, 2)
    ids = [base.tokenizer.chat([("user", "hello")])]
    weights = torch.tensor([[0.0, 1.0, 0.0]])
    token = greedy(base.decoder, ids, set(), 3, adapters, weights)[0][2]
    ending = type("Ending", (), {})()
    ending.decoder = base.decoder
    ending.tokenizer = type(base.tokenizer)(base.tokenizer._hf, frozenset({token}))
    model = Answering(ending, adapters, NAMES)
    assert model.right([Case("hello", ("b",), first)], [{"b": 1.0}]).tolist() == [1.0]


def test_what_was_asked_is_not_generated_again(base, adapters, monkeypatch):
    """Only a longer answer, another mixture or another turn ahead is."""
    from router_training.evaluation import answers

    generated = []

    def counted(decoder, prompts, *rest):
        generated.append(len(prompts))
        return greedy(decoder, prompts, *rest)

    monkeypatch.setattr(answers, "greedy", counted)
    model = Answering(base, adapters, NAMES)
    cases = [Case("one", ("a",), "xy"), Case("two", ("b",), "xyz"), Case("one", ("a",), "xy")]
    first = model.right(cases, own_mixtures(cases))
    assert sum(generated) == 2
    assert model.right(cases, own_mixtures(cases)).tolist() == first.tolist()
    assert sum(generated) == 2
    model.right([Case("one", ("a",), "a longer one")], own_mixtures(cases[:1]))
    model.right(cases[:1], [{}])
    model.right(cases[:1], own_mixtures(cases[:1]), "be brief")
    assert sum(generated) == 5
