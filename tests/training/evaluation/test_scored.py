"""Scoring without the server gives what the server decides."""

from __future__ import annotations

import numpy as np
import pytest

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.registry import Registry
from mora_serve.adapters.validate import read_directory
from mora_serve.config import AdaptersConfig
from mora_serve.core import DEFAULT_TENANT
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.shape import shape_from_config
from mora_serve.router.routing import ROUTER_FILE, Routing
from router_training.demo.tasks import TASKS
from router_training.evaluation.cases import texts
from router_training.evaluation.scored import join


@pytest.fixture
def routing(scorer):
    """The server's routing with the same router and cards; the weights do not matter."""
    import json

    bundle, limits = bundle_path(), AdaptersConfig()
    shape = shape_from_config(json.loads((bundle / "base/config.json").read_text()))
    content = read_directory(str(bundle / "adapters"), "reverse", shape, limits)
    with Registry(None, limits, shape) as registry:
        registry.set_router({ROUTER_FILE: scorer.router.content.to_bytes()})
        for name, prompts in scorer.cards.items():
            card = RoutingCard(group=TASKS[name].group, prompts=tuple(prompts))
            registry.register(DEFAULT_TENANT, name, content, card=card)
        yield Routing(registry, "")


def test_choices_and_probabilities_are_the_servers(scorer, routing, cases, suite):
    """For prompts of one adapter, of two, and of nobody."""
    prompts = texts([*cases, *suite.pairs.both()[:30], *suite.near[:10], *suite.far[:10]])
    scored = scorer(prompts)
    for i, prompt in enumerate(prompts):
        choice = routing.route(DEFAULT_TENANT, prompt, None, 4).choice
        assert scored.chosen[i] == choice.adapters == scorer.route(prompt).adapters
        assert scored.inside[i] == choice.candidates[0].probability
        for place, candidate in enumerate(choice.candidates):
            column = scored.names.index(candidate.adapter)
            assert scored.ranking[i, column] == -place
            assert scored.probability[i, column] == pytest.approx(candidate.probability)


def test_joined_parts_keep_each_adapters_column(scorer, method, data, cases):
    """Routers that hold the same adapters in another order are joined by name."""
    turned = method(data).register(dict(reversed(scorer.cards.items())))
    whole = join([scorer(texts(cases[:3])), turned(texts(cases[3:]))])
    assert whole.names == scorer.names
    assert np.allclose(whole.ranking, scorer(texts(cases)).ranking, atol=1e-6)
    assert whole.chosen == scorer(texts(cases)).chosen


def test_truth_and_wanted_follow_the_names(scorer, cases, suite):
    """Columns by name, -1 and no column for a prompt of nobody."""
    mixed = [cases[0], cases[-1], suite.far[0]]
    scored = scorer(texts(mixed))
    assert [scored.names[i] for i in scored.truth(mixed)[:2]] == [c.adapters[0] for c in mixed[:2]]
    assert scored.truth(mixed)[2] == -1
    assert scored.wanted(mixed).sum(1).tolist() == [1, 1, 0]
