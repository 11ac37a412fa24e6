"""A crowded engine goes through the same steps in every run."""

from __future__ import annotations

import copy
import random
from pathlib import Path

from benchmarks import concurrency, families, oracle
from mora_serve.config import EngineConfig


def test_a_round_with_few_pages_repeats_itself(tmp_path: Path) -> None:
    """The same arrivals, batches and answers, however long the adapters took to load."""
    model = families.make_base("llama3", tmp_path / "base")
    oracle.make_adapters(copy.deepcopy(model), tmp_path / "adapters")
    rng = random.Random(0)
    jobs = [concurrency.random_job(rng) for _ in range(8)]
    rounds = []
    for _ in range(2):
        limits = EngineConfig(max_batch=8, page_size=4, kv_pages=60)
        with concurrency.engine(tmp_path, limits) as crowd:
            answers, batches = concurrency.run(crowd, jobs, random.Random(1))
            preemptions = crowd.engine.stats().preemptions
        rounds.append(([[t.id for t in a] for a in answers], batches, preemptions))
    assert rounds[0] == rounds[1]
    assert max(rounds[0][1]) > 1
    assert rounds[0][2] > 0
