"""Each answer of a crowded engine against the same request alone.

64 requests with random mixtures, lengths, sampling and arrivals share one engine, unquantised in
fp32: twice with the prefix cache on (the engine's own counts are sums over both rounds; the second
round's hits are the difference), and with so few pages that requests are preempted. A first
difference from the lone answer is allowed only where the two best logits lie within 1e-4.

    python -m benchmarks.concurrency --json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import families, oracle, report
from benchmarks.local import Job, LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import Event, SamplingParams, TokenOut

TIE = 1e-4


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="llama3")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = families.make_base(args.family, root / "base")
        oracle.make_adapters(copy.deepcopy(model), root / "adapters")
        jobs = [random_job(rng) for _ in range(args.requests)]
        with engine(root, EngineConfig(max_batch=1, prefix_cache=False)) as alone:
            want = [run(alone, [job], random.Random(0))[0] for job in jobs]
        report.log("alone: done")
        rounds: dict[str, Any] = {}
        with engine(root, EngineConfig(max_batch=64, step_tokens=256)) as crowd:
            for name in ("first", "second"):
                rounds[name] = compare(want, run(crowd, jobs, rng), crowd)
                report.log(f"{name}: {rounds[name]}")
        few = EngineConfig(max_batch=64, step_tokens=256, kv_pages=20)
        with engine(root, few, len(oracle.VARIANTS)) as crowd:
            rounds["few-pages"] = compare(want, run(crowd, jobs, rng), crowd)
            report.log(f"few pages: {rounds['few-pages']}")
    page = EngineConfig().page_size
    paged = sum(len(prompt) // page * page for prompt, _, _ in jobs)
    second_hits = rounds["second"]["prefix_hits"] - rounds["first"]["prefix_hits"]
    report.emit(
        {
            "requests": args.requests,
            "rounds": rounds,
            "different": sum(r["different"] for r in rounds.values()),
            "prompt_tokens_in_full_pages": paged,
            "second_round_prefix_hits": second_hits,
            "second_round_prefix_share": second_hits / paged,
            "preemptions": rounds["few-pages"]["preemptions"],
            "environment": report.environment(),
        }
    )


def engine(root: Path, limits: EngineConfig, slots: int = 8) -> LocalEngine:
    """An unquantised fp32 engine; by default with fewer slots than there are adapters."""
    config = Config(
        BaseConfig(str(root / "base"), quantization="none", dtype="fp32", device="cpu"),
        limits,
        AdaptersConfig(slots=slots, max_rank=64),
    )
    local = LocalEngine(config)
    for name in oracle.VARIANTS:
        local.register(name, root / "adapters", name)
    return local


def random_job(rng: random.Random) -> Job:
    """A prompt (its beginning often shared), a mixture of 0 to 4 adapters, greedy or sampled."""
    shared = [4 + (7 * i) % 300 for i in range(rng.choice((0, 20, 48)))]
    prompt = shared + [rng.randrange(4, 320) for _ in range(rng.randint(1, 70))]
    names = rng.sample(sorted(oracle.VARIANTS), rng.choice((0, 1, 1, 2, 3, 4)))
    mixture = {name: round(rng.uniform(-0.8, 1.2), 3) for name in names}
    sampling = SamplingParams(rng.randint(1, 48), logprobs=2, ignore_eos=True)
    if rng.random() < 0.25:
        sampling = dataclasses.replace(
            sampling, temperature=0.8, top_k=40, seed=rng.getrandbits(32)
        )
    return prompt, mixture, sampling


def run(local: LocalEngine, jobs: Sequence[Job], rng: random.Random) -> list[list[TokenOut]]:
    """Submit the jobs in random order over the first steps; the tokens of each."""
    order = rng.sample(range(len(jobs)), len(jobs))
    answers: list[list[TokenOut]] = [[] for _ in jobs]
    index: dict[str, int] = {}
    left = len(jobs)
    while left:
        for _ in range(rng.randint(0, 4)):
            if order:
                request = local.request(jobs[i := order.pop()])
                index[request.id] = i
                local.engine.submit(request)
        for event in local.step():
            if isinstance(event, Event):
                answers[index[event.request_id]] += event.tokens
                if event.error is not None:
                    raise event.error.error()
                left -= event.finish is not None
    local.engine.scheduler.check_integrity()
    local.engine.pool.check_integrity()
    return answers


def compare(
    want: Sequence[Sequence[TokenOut]], got: Sequence[Sequence[TokenOut]], local: LocalEngine
) -> dict[str, int]:
    """Answers that differ without the excuse of a tie, and what the engine went through."""
    different = ties = 0
    for w, g in zip(want, got, strict=True):
        pairs = zip(w, g, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a.id != b.id), None)
        if first is None:
            different += len(w) != len(g)
        elif w[first].top[0].logprob - w[first].top[1].logprob <= TIE:
            ties += 1
        else:
            different += 1
    stats = local.engine.stats()
    return {
        "different": different,
        "ties": ties,
        "preemptions": stats.preemptions,
        "prefix_hits": stats.prefix_hits,
        "slot_evictions": stats.slot_evictions,
    }


if __name__ == "__main__":
    main()
