"""Routers, keys and cards for tests: the demo's tasks, fitted small."""

from __future__ import annotations

import functools
import random

import numpy as np

from mora_serve.adapters.card import RoutingCard
from mora_serve.router.features import Floats, NGrams
from mora_serve.router.format import Calibration, RouterFile
from mora_serve.router.router import AdapterKey, Router, unit
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import KNOWN, TASKS
from router_training.router import fit_router

FINGERPRINT = "base-1"
DIMS = 64


@functools.cache
def fitted(seed: int = 0) -> bytes:
    """A router's file, fitted on the demo's known tasks in a fraction of a second."""
    examples = {name: prompts(name, 1, 30) for name in KNOWN}
    rng = random.Random(1)
    outside = [out_of_domain(rng) for _ in range(150)]
    features = NGrams(dim=512)
    data, _ = fit_router(
        examples, outside, FINGERPRINT, features=features, dims=DIMS, strengths=(1.0,), seed=seed
    )
    return data


@functools.cache
def router() -> Router:
    return Router.load(fitted(), FINGERPRINT)


def prompts(task: str, seed: int, count: int) -> list[str]:
    return [prompt for prompt, _ in TASKS[task].examples(seed, count)]


def card(task: str, seed: int = 3, count: int = 16, group: str | None = None) -> RoutingCard:
    """The card of an adapter for a demo task, its prompts those of no fit."""
    own = TASKS[task].group if group is None else group
    return RoutingCard(TASKS[task].description, (task,), own, tuple(prompts(task, seed, count)))


def tiny(seed: int = 0, dim: int = 64, dims: int = 8, impostors: int = 5) -> RouterFile:
    """A sound file of random numbers."""
    rng = np.random.default_rng(seed)
    return RouterFile(
        features=NGrams(dim=dim),
        mean=rng.random(dim).astype(np.float32),
        scales=(0.01 * rng.random(dims)).astype(np.float32),
        codes=rng.integers(-127, 128, (dims, dim)).astype(np.int8),
        impostors=vectors(seed, impostors, dims).astype(np.float16).astype(np.float32),
        calibration=Calibration(3.0, 0.5, 0.1, 0.3),
        fingerprint=FINGERPRINT,
        known=("reverse", "sort"),
        report={"known": 0.99},
    )


def vectors(seed: int, count: int, dims: int = 256) -> Floats:
    """Random unit vectors [count, dims]."""
    return unit(np.random.default_rng(seed).normal(size=(count, dims)).astype(np.float32))


def key(prototype: Floats) -> AdapterKey:
    return AdapterKey(prototype, 0.01, 0.0625, 0.6)
