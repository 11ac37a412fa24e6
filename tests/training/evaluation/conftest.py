"""A router for five of the demo's tasks, fitted once; its prompts."""

from __future__ import annotations

import pytest

from mora_serve.router.features import Features, NGrams
from mora_serve.router.router import Router
from router_training.demo.suite import FRESH_SEED, demo_suite, fitting_data
from router_training.evaluation.cases import texts
from router_training.evaluation.refit import ours
from router_training.router import FitOptions, fit_router
from router_training.router_data import RouterData

NAMES = ("reverse", "uppercase", "roman", "json", "brackets")


@pytest.fixture(scope="package")
def data():
    return fitting_data(NAMES, seed=3, prompts=40)


@pytest.fixture(scope="package")
def router_file(data):
    """What a router of 256 features is like."""
    examples = {name: texts(cases) for name, cases in data.examples.items()}
    options = FitOptions(features=Features(NGrams(dim=256)), dims=128)
    content, _ = fit_router(RouterData.of(examples, data.far, data.near), options=options)
    return Router.load(content).content


@pytest.fixture(scope="package")
def method(router_file):
    return ours(router_file)


@pytest.fixture(scope="package")
def scorer(method, data):
    cards = {name: texts(cases[:16]) for name, cases in data.examples.items()}
    return method(data).register(cards)


@pytest.fixture(scope="package")
def suite():
    """All fifteen tasks' prompts."""
    return demo_suite(seed=FRESH_SEED + 77, prompts=4)


@pytest.fixture(scope="package")
def cases(suite):
    return [case for case in suite.kept_templates if case.adapters[0] in NAMES]
