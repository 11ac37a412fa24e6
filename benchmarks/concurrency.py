"""Each answer of a crowded engine against the same request alone.

64 requests with random mixtures, lengths, sampling and arrivals share one engine, unquantised in
fp32: twice with the prefix cache on (the engine's own counts are sums over both rounds; the second
round's hits are the difference), with so few pages that requests are preempted, and with so few
slots that adapters are evicted. A first difference from the lone answer is allowed only where the
two best logits lie within 1e-4.

All adapters are in their slots before a round begins, so that the steps are the same in every run;
with few slots the loads take part, and they take as long as they take.

    python -m benchmarks.concurrency --json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import families, oracle, report
from benchmarks.local import Job, LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import Event, SamplingParams, TokenOut
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence as Running

TIE = 1e-4
LONGEST = 96  # tokens of an answer
FEW_PAGES, FEW_SLOTS = 120, 8


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
            want = [run(alone, [job], random.Random(0))[0][0] for job in jobs]
        report.log("alone: done")
        rounds: dict[str, dict[str, float]] = {}
        wide = EngineConfig(max_batch=64, step_tokens=256)
        few_pages = dataclasses.replace(wide, page_size=4, kv_pages=FEW_PAGES)
        for names, limits, slots in (
            (("first", "second"), wide, len(oracle.VARIANTS)),
            (("few-pages",), few_pages, len(oracle.VARIANTS)),
            (("few-slots",), wide, FEW_SLOTS),
        ):
            with engine(root, limits, slots) as crowd:
                for name in names:
                    got, batches = run(crowd, jobs, random.Random(f"{args.seed} {name}"))
                    rounds[name] = compare(want, got, batches, crowd)
                    report.log(f"{name}: {rounds[name]}")
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
            "most_running": min(rounds[r]["most_running"] for r in ("first", "second")),
            "median_running": min(rounds[r]["median_running"] for r in ("first", "second")),
            "preemptions": rounds["few-pages"]["preemptions"],
            "slot_evictions": rounds["few-slots"]["slot_evictions"],
            "environment": report.environment(),
        }
    )


def engine(root: Path, limits: EngineConfig, slots: int = len(oracle.VARIANTS)) -> LocalEngine:
    """An unquantised fp32 engine; adapters are in their slots already where all have one.

    The size of a step does not depend on what others took, so that a run repeats itself.
    """
    config = Config(
        BaseConfig(str(root / "base"), quantization="none", dtype="fp32", device="cpu"),
        dataclasses.replace(limits, step_pace=0.0),
        AdaptersConfig(slots=slots, max_rank=64),
    )
    local = LocalEngine(config)
    for name in oracle.VARIANTS:
        local.register(name, root / "adapters", name)
    if slots >= len(oracle.VARIANTS):
        local.make_resident(list(oracle.VARIANTS))
        local.engine.pool.drop(tuple(local.digests.values()))
    return local


def random_job(rng: random.Random) -> Job:
    """A prompt (its beginning often shared), a mixture of 0 to 4 adapters, greedy or sampled."""
    shared = [4 + (7 * i) % 300 for i in range(rng.choice((0, 20, 48)))]
    prompt = shared + [rng.randrange(4, 320) for _ in range(rng.randint(1, 70))]
    names = rng.sample(sorted(oracle.VARIANTS), rng.choice((0, 1, 1, 2, 3, 4)))
    mixture = {name: round(rng.uniform(-0.8, 1.2), 3) for name in names}
    sampling = SamplingParams(rng.randint(1, LONGEST), logprobs=2, ignore_eos=True)
    if rng.random() < 0.25:
        sampling = dataclasses.replace(
            sampling, temperature=0.8, top_k=40, seed=rng.getrandbits(32)
        )
    return prompt, mixture, sampling


def run(
    local: LocalEngine, jobs: Sequence[Job], rng: random.Random
) -> tuple[list[list[TokenOut]], list[int]]:
    """Submit the jobs in random order over the first steps; the tokens of each.

    Also the number of requests in each batch.
    """
    order = rng.sample(range(len(jobs)), len(jobs))
    answers: list[list[TokenOut]] = [[] for _ in jobs]
    index: dict[str, int] = {}
    left = len(jobs)
    with batch_sizes(local) as batches:
        while left:
            for _ in range(min(rng.randint(0, 4), len(order)) if order else 0):
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
    return answers, batches


@contextmanager
def batch_sizes(local: LocalEngine) -> Iterator[list[int]]:
    """How many requests each batch holds, of those that run meanwhile."""
    sizes: list[int] = []
    runner = local.engine.runner
    plain = runner.run

    def run(batch: Sequence[Chunk]) -> list[tuple[Running, TokenOut | None]]:
        sizes.append(len(batch))
        return plain(batch)

    runner.run = run  # type: ignore[method-assign]
    yield sizes
    runner.run = plain  # type: ignore[method-assign]


def compare(
    want: Sequence[Sequence[TokenOut]],
    got: Sequence[Sequence[TokenOut]],
    batches: Sequence[int],
    local: LocalEngine,
) -> dict[str, float]:
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
        "most_running": max(batches),
        "median_running": statistics.median(batches),
        "preemptions": stats.preemptions,
        "prefix_hits": stats.prefix_hits,
        "slot_evictions": stats.slot_evictions,
    }


if __name__ == "__main__":
    main()
