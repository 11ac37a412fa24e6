"""The server's router fitted again, as a method to compare with others."""

from __future__ import annotations

from dataclasses import replace

from mora_serve.router.features import Pool
from mora_serve.router.format import RouterFile
from mora_serve.router.router import Router
from router_training.evaluation.cases import FittingData
from router_training.evaluation.scored import Fitted, FittedRouter, Method
from router_training.router import FitOptions, fit_router
from router_training.router_data import Labelled, RouterData


def router_data(data: FittingData) -> RouterData:
    """The same prompts as a router's fit takes them."""
    singles = [case for cases in data.examples.values() for case in cases]
    labelled = [Labelled(case.prompt, case.adapters) for case in (*singles, *data.pairs)]
    return RouterData(labelled, data.near, data.far, data.groups)


def ours(
    like: RouterFile, pool: Pool | None = None, seed: int = 0, *, search: bool = False
) -> Method:
    """The server's router, fitted for the same base and on the same features as ``like``.

    Keys have as many dimensions and prototypes. What ``like`` chose by accuracy on adapters held
    out in its own fitting, λ and the prototypes' weight, is taken over; ``search``: it is chosen
    again, as that fitting did. ``pool`` gives the states of prompts where the features need them.
    """
    options = FitOptions(
        features=like.features,
        dims=like.dims,
        prototypes=like.prototypes,
        seed=seed,
    )
    if not search:
        options = replace(
            options, strengths=(like.report["strength"],), blends=(like.calibration.blend,)
        )

    def fit(data: FittingData) -> Fitted:
        content, _ = fit_router(router_data(data), like.fingerprint, options, pool)
        return FittedRouter(Router.load(content), data.groups, pool)

    return fit
