"""The server's router fitted again is of the same kind as the one that it stands for."""

from __future__ import annotations

import pytest

from mora_serve.router.features import Features, NGrams, PooledHidden
from mora_serve.router.format import read_router
from router_training.evaluation.cases import texts
from router_training.evaluation.refit import ours
from router_training.router import FitOptions, fit_router
from router_training.router_data import Labelled, RouterData

HIDDEN = PooledHidden(1, 32)


def pool(prompts):
    """States [n, 32] that depend on the prompt alone."""
    return NGrams(dim=32).dense(list(prompts))


@pytest.mark.parametrize(
    "features",
    [Features(NGrams(dim=128)), Features(None, HIDDEN), Features(NGrams(dim=128), HIDDEN)],
    ids=["n-grams", "hidden states", "both"],
)
def test_a_router_fitted_again_is_for_the_same_base_and_features(features, data, cases):
    """Also one on hidden states; keys have no more prototypes, and prompts find their adapter."""
    labelled = [Labelled(c.prompt, c.adapters) for own in data.examples.values() for c in own]
    options = FitOptions(features, dims=32, prototypes=3, strengths=(0.3,), blends=(0.33,))
    content, _ = fit_router(RouterData(labelled, data.near, data.far), "a base", options, pool)
    like, _ = read_router(content)
    cards = {name: texts(own[:16]) for name, own in data.examples.items()}
    scorer = ours(like, pool)(data).register(cards)
    found = scorer.router.content
    assert (found.fingerprint, found.features) == ("a base", features)
    assert (found.dims, found.prototypes) == (32, 3)
    assert (found.report["strength"], found.calibration.blend) == (0.3, 0.33)
    assert {len(key.prototypes) for key in scorer.keys.values()} == {3}
    scored = scorer(texts(cases))
    assert (scored.ranking.argmax(1) == scored.truth(cases)).mean() > 0.6
