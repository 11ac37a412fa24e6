"""What the router learns in joint training, and what it is judged on, are apart."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mora_serve.router.decide import decide
from mora_serve.router.evidence import gather
from mora_serve.router.index import Index
from mora_serve.router.router import Router
from mora_serve.router.rows import Entry
from router_training.batches import TokenRow
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import TASKS
from router_training.joint_study import Example, JointData, JointStudy
from router_training.router import FitOptions, fit_router

NAMES = ("uppercase", "reverse", "roman", "json")
STEPS = 200
OPTIONS = FitOptions(dims=4, strengths=(0.3,), blends=(0.33,), folds=2, correct=False)


def data_of(prompts):
    examples = [Example(p, TokenRow((), ()), (i,)) for i, own in enumerate(prompts) for p in own]
    examples += [
        Example(f"{a}, then {b}", TokenRow((), ()), (0, 3))
        for a, b in zip(prompts[0][:24], prompts[3][:24], strict=True)
    ]
    rng = random.Random(0)
    return JointData(examples, NAMES, [out_of_domain(rng) for _ in range(128)])


@pytest.fixture(scope="module")
def prompts():
    return [[p for p, _ in TASKS[name].examples(1, 40)] for name in NAMES]


def study_of(data):
    return JointStudy.of(data, OPTIONS, held_out=0.25, rank=4, seed=0)


def taught(study, steps):
    """Learnt from the gates' two terms."""
    rng = random.Random(0)
    for learner in (study.judged, study.served):
        optimizer = torch.optim.Adam(learner.graded.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(sum(learner.terms(64, rng)))
            optimizer.step()
    return study


@pytest.fixture(scope="module")
def study(prompts):
    return taught(study_of(data_of(prompts)), STEPS)


def test_what_is_held_out_teaches_the_judged_router_nothing(prompts, study):
    """With other prompts of that adapter the correction is the same, bit for bit."""
    [held] = study.held_out
    at = NAMES.index(study.study.names[held])
    assert at not in (0, 3)
    changed = list(prompts)
    changed[at] = [f"entirely other words {i}" for i in range(len(set(prompts[at])))]
    other = taught(study_of(data_of(changed)), STEPS)
    assert other.judged.corrected().to_bytes() == study.judged.corrected().to_bytes()
    assert other.served.corrected().to_bytes() != study.served.corrected().to_bytes()


def test_wordings_kept_are_learned_by_the_served_router_only(study):
    """Of every adapter, and of none held out."""
    for i, rows in enumerate(study.study.kept):
        kept = [study.study.table.texts[row] for row in rows]
        assert kept
        assert not any(study.judged.learns(p) for p in kept)
        assert all(study.served.learns(p) for p in kept)
        learned = study.study.table.texts[study.study.learn[i][0]]
        assert study.judged.learns(learned) == (i not in study.held_out)


def test_nothing_of_an_adapter_held_out_reaches_the_judged_router(study, prompts):
    """Its gate is shut and has no gradient, even for its own prompts; the served one's opens."""
    [held] = study.held_out
    column = NAMES.index(study.study.names[held])
    picked = study.judged.picked(prompts[column])
    assert not picked[:, column].any()
    gradients = torch.autograd.grad(
        picked[:, column].sum(), study.judged.graded.parameters(), materialize_grads=True
    )
    assert not any(g.any() for g in gradients)
    assert study.served.picked(prompts[column])[:, column].sum() > len(prompts[column]) / 2
    assert not any(study.judged.learns(p) for p in prompts[column])


def test_a_correction_that_helps_is_served_with_gates_of_its_own(study, prompts):
    """Four dimensions are too few without one; prompts are then routed to their adapters."""
    content, figures = study.judge()
    assert figures["kept"]
    assert content.calibration != study.served.content.calibration
    assert content.known == tuple(sorted(NAMES))
    router = Router(content)
    keys = [router.key(own[:16]) for own in prompts]
    index = Index.of([("", Entry(n, k)) for n, k in zip(NAMES, keys, strict=True)])
    right = []
    for name in NAMES:
        for prompt, _ in TASKS[name].examples(5, 10):
            seen = gather(router, index, "", prompt)
            right.append(decide(seen, router.calibration, 4).adapters == (name,))
    assert np.mean(right) > 0.7


def test_one_that_does_not_leaves_the_plain_router(prompts):
    """Untaught, it changes nothing: the file is that of the fit on everything, byte for byte."""
    data = data_of(prompts)
    content, figures = study_of(data).judge()
    assert not figures["kept"]
    assert figures["held_out_plain"] == figures["held_out_corrected"]
    assert content.to_bytes() == fit_router(data.routing(), options=OPTIONS)[0]


@pytest.mark.parametrize(
    ("plain", "other", "kept"),
    [
        ((0.8, 0.8, 0.8), (0.9, 0.8, 0.8), True),
        ((0.8, 0.8, 0.8), (0.7, 0.95, 0.8), True),
        ((0.8, 0.8, 0.8), (1.0, 0.79, 0.9), False),
        ((0.8, 0.8, 0.8), (1.0, 0.9, 0.79), False),
        ((0.8, 0.8, 0.8), (0.8, 0.8, 0.8), False),
    ],
)
def test_it_stays_only_where_nobody_unseen_and_no_pair_loses(
    study, monkeypatch, plain, other, kept
):
    """Adapters that it learned from may lose, where the mean rises."""
    names = ("known", "held_out", "together")
    calibration = study.served.content.calibration
    answers = iter([plain, other])
    monkeypatch.setattr(
        JointStudy,
        "_measured",
        lambda self, content: (calibration, dict(zip(names, next(answers), strict=True))),
    )
    assert study.judge()[1]["kept"] is kept


def test_without_an_adapter_held_out_there_is_no_figure_of_one(prompts):
    study = JointStudy.of(data_of(prompts), OPTIONS, held_out=0.0, rank=4, seed=0)
    assert {n.rpartition("_")[0] for n in study.judge()[1]} == {"known", "together", ""}
