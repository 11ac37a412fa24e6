"""Routers, keys and cards for tests: the demo's tasks, fitted small."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from mora_serve.adapters.card import RoutingCard
from mora_serve.errors import FailedPrecondition
from mora_serve.router.arrays import Floats, unit
from mora_serve.router.features import Features, NGrams, PooledHidden
from mora_serve.router.format import Calibration, Gate, RouterFile
from mora_serve.router.router import AdapterKey, Router
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import KNOWN, TASKS
from router_training.router import FitOptions, fit_router
from router_training.router_data import RouterData

FINGERPRINT = "base-1"
DIMS = 64
HIDDEN = PooledHidden(depth=1, dim=48)
CALIBRATION = Calibration(0.5, 0.25, Gate((20.0,), -6.0), Gate((16.0, 12.0), -4.0))


@functools.cache
def fitted(seed: int = 0, hidden: PooledHidden | None = None) -> bytes:
    """A router's file, fitted on the demo's known tasks in a fraction of a second."""
    examples = {name: prompts(name, 1, 30) for name in KNOWN}
    rng = random.Random(1)
    outside = [out_of_domain(rng) for _ in range(150)]
    options = FitOptions(
        Features(NGrams(dim=512), hidden), DIMS, strengths=(1.0,), blends=(0.33,), seed=seed
    )
    data, _ = fit_router(RouterData.of(examples, outside), FINGERPRINT, options, pooled)
    return data


def pooled(texts: Sequence[str]) -> Floats:
    """What ``Base`` makes of texts: their words and n-grams, mixed at random [texts, 48]."""
    mix = np.random.default_rng(7).normal(size=(512, HIDDEN.dim)).astype(np.float32)
    return np.einsum("nd,dk->nk", NGrams(dim=512).dense(texts), mix)


class Base:
    """The states of a base whose pace and failures a test decides.

    While ``held``, nothing is answered until ``release``. ``error`` is what askers get.
    """

    def __init__(self) -> None:
        self.held = False
        self.error: Exception | None = None
        self.asked: list[tuple[tuple[str, ...], bool]] = []  # texts, background
        self.tenants: list[str] = []  # of those, whose they are
        self._waiting: list[tuple[Future[Floats], Sequence[str]]] = []

    def check(self, hidden: PooledHidden) -> None:
        if hidden.dim != HIDDEN.dim:
            raise FailedPrecondition("router: another size", field="router.features")

    def submit(
        self,
        texts: Sequence[str],
        hidden: PooledHidden,
        *,
        background: bool = False,
        tenant: str = "",
    ) -> Future[Floats]:
        self.asked.append((tuple(texts), background))
        self.tenants.append(tenant)
        future: Future[Floats] = Future()
        self._waiting.append((future, texts))
        if not self.held:
            self.release()
        return future

    def release(self) -> None:
        self.held = False
        waiting, self._waiting = self._waiting, []
        for future, texts in waiting:
            if self.error is not None:
                future.set_exception(self.error)
            else:
                future.set_result(pooled(texts))


@functools.cache
def router() -> Router:
    return Router.load(fitted(), FINGERPRINT)


def prompts(task: str, seed: int, count: int) -> list[str]:
    return [prompt for prompt, _ in TASKS[task].examples(seed, count)]


def card(task: str, seed: int = 3, count: int = 16, group: str | None = None) -> RoutingCard:
    """The card of an adapter for a demo task, its prompts those of no fit."""
    own = TASKS[task].group if group is None else group
    return RoutingCard(TASKS[task].description, (task,), own, tuple(prompts(task, seed, count)))


def tiny(
    seed: int = 0,
    dim: int = 64,
    dims: int = 8,
    hidden: PooledHidden | None = None,
) -> RouterFile:
    """A sound file of random numbers."""
    rng = np.random.default_rng(seed)
    features = Features(NGrams(dim=dim), hidden)
    mean = rng.random(features.dim).astype(np.float32)
    mean[dim::2] *= -1
    return RouterFile(
        features=features,
        mean=mean,
        scales=(0.01 * rng.random(dims)).astype(np.float32),
        codes=rng.integers(-127, 128, (dims, features.dim)).astype(np.int8),
        calibration=CALIBRATION,
        prototypes=3,
        fingerprint=FINGERPRINT,
        known=("reverse", "sort"),
        report={"known": 0.99},
    )


def vectors(seed: int, count: int, dims: int = 256) -> Floats:
    """Random unit vectors [count, dims]."""
    return unit(np.random.default_rng(seed).normal(size=(count, dims)).astype(np.float32))


def key(centre: Floats, *others: Floats, words: frozenset[int] = frozenset()) -> AdapterKey:
    """A key with the centre and the others as its prototypes."""
    return AdapterKey(centre, np.stack([centre, *others]), words)
