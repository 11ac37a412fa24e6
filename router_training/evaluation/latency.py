"""How long one decision takes, by the number of registered adapters."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mora_serve.router.arrays import unit
from mora_serve.router.router import AdapterKey
from mora_serve.router.rows import Entry
from router_training.evaluation.scored import RouterScorer


def measure_latency(
    scorer: RouterScorer,
    prompts: Sequence[str],
    counts: Sequence[int] = (100, 1000, 10_000),
    *,
    repeat: int = 200,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Milliseconds from text to choice on one core, with the adapters there are and with more.

    The added ones have random keys: what a decision costs depends on their number only. A row has
    the number of ``adapters``, the medians of embedding the prompt (``features_ms``) and of the
    whole decision, and the latter's 99th percentile.
    """
    own = next(iter(scorer.keys.values()))
    rows = []
    for count in (len(scorer.keys), *(n for n in counts if n > len(scorer.keys))):
        more = scorer.beside(_strangers(own, count - len(scorer.keys), seed))
        rows.append({"adapters": count, **_timed(more, prompts, repeat)})
    return rows


def _strangers(like: AdapterKey, count: int, seed: int) -> list[Entry]:
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((count, len(like.centre)), np.float32))
    shape = like.prototypes.shape
    return [
        Entry(
            f"stranger-{i}",
            dataclasses.replace(like, centre=own, prototypes=np.broadcast_to(own, shape)),
        )
        for i, own in enumerate(centres)
    ]


def _timed(scorer: RouterScorer, prompts: Sequence[str], repeat: int) -> dict[str, float]:
    found = np.zeros((repeat, 2))
    for i in range(-5, repeat):  # the first few do not count
        prompt = prompts[i % len(prompts)]
        started = time.perf_counter()
        scorer.embedded([prompt])
        embedded = time.perf_counter()
        scorer.route(prompt)
        if i >= 0:
            found[i] = embedded - started, time.perf_counter() - embedded
    features, decision = 1e3 * np.median(found, axis=0)
    return {
        "features_ms": round(float(features), 4),
        "decision_ms": round(float(decision), 4),
        "decision_p99_ms": round(1e3 * float(np.quantile(found[:, 1], 0.99)), 4),
    }
