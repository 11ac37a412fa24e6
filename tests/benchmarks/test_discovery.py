"""Which of the adapters found the discovery benchmark's prompts are routed to."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks.discovery import by_router
from mora_serve.config import BaseConfig
from mora_serve.demo.bundle import bundle_path
from mora_serve.model.loading import load_base
from mora_serve.model.stacked import StackedAdapters
from mora_serve.router.features import NGrams
from router_training.clusters import TextGate
from router_training.demo.base import tokens
from router_training.demo.coded import Row
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.tasks import TASKS
from router_training.discovered import Discovered, UnlabelledRow

NAMES = ("reverse", "uppercase", "roman", "json")


def rows_of(seed: int, count: int) -> list[UnlabelledRow]:
    return [
        UnlabelledRow(tokens(Row(prompt, answer)), prompt)
        for name in NAMES
        for prompt, answer in TASKS[name].examples(seed, count)
    ]


@pytest.fixture(scope="module")
def routed() -> dict[str, list[tuple[int, ...]]]:
    """Picks for fresh prompts of four tasks, 16 each in order, and for prompts of none."""
    base = load_base(BaseConfig(str(bundle_path() / "base"), dtype="fp32", device="cpu"))
    rows, features = rows_of(1, 40), NGrams(dim=256)
    own = np.repeat(np.arange(len(NAMES)), 40)
    sure = np.eye(len(NAMES))[own]
    gate = TextGate.fit(features.dense([row.text for row in rows]).astype(float), sure)
    adapters = StackedAdapters(base.shape, len(NAMES), 2, 4.0)
    found = Discovered(adapters, own, sure, 1 - sure, gate, features, own)
    rng = random.Random("fresh")
    outside = [out_of_domain(rng, "test") for _ in range(64)]
    inside = [row.text for row in rows_of(2, 16)]
    picked = by_router(base, found, rows, [*inside, *outside])
    return {"inside": picked[: len(inside)], "outside": picked[len(inside) :]}


def test_fresh_prompts_go_to_the_adapter_of_their_task(routed):
    best = [own[:1] for own in routed["inside"]]
    right = [(i,) for i in range(len(NAMES)) for _ in range(16)]
    assert np.mean([a == b for a, b in zip(best, right, strict=True)]) > 0.9


def test_prompts_of_no_task_get_no_adapter(routed):
    """What the router abstains on is not counted for its best candidate."""
    assert np.mean([own == () for own in routed["outside"]]) > 0.8
