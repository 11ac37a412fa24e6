"""The server's router fitted again, as a method to compare with others."""

from __future__ import annotations

from collections.abc import Mapping

from mora_serve.router.features import Pool
from mora_serve.router.format import RouterFile
from mora_serve.router.router import Router
from router_training.evaluation.cases import FittingData
from router_training.evaluation.scored import Fitted, FittedRouter, Method
from router_training.router import FitOptions, fit_router
from router_training.router_data import Labelled, RouterData


def ours(
    groups: Mapping[str, str], like: RouterFile, pool: Pool | None = None, seed: int = 0
) -> Method:
    """The server's router, fitted on the same features to as many dimensions as ``like``.

    What ``like`` chose by accuracy on adapters held out in its own fitting, λ and the prototypes'
    weight, is taken over. ``groups`` are the adapters', by name; ``pool`` gives the states
    of prompts where the features need them.
    """
    options = FitOptions(
        features=like.features,
        dims=like.dims,
        strengths=(like.report["strength"],),
        blends=(like.calibration.blend,),
        seed=seed,
    )

    def fit(data: FittingData) -> Fitted:
        singles = [case for cases in data.examples.values() for case in cases]
        labelled = [Labelled(case.prompt, case.adapters) for case in (*singles, *data.pairs)]
        content, _ = fit_router(
            RouterData(labelled, data.near, data.far, groups), options=options, pool=pool
        )
        return FittedRouter(Router.load(content), groups, pool)

    return fit
