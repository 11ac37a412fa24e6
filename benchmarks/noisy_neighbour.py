"""A quiet tenant beside one that floods the server: how long its first tokens take.

A small Llama in NF4 (another size by flags) with adapters of each tenant and a router, in a process
of its own, whose engine computes on one thread, and a key of each tenant. Both send prompts alike,
in turn to the base, to an adapter, and to the router; all answers are streams. The quiet one's
Poisson arrivals are a part of what the server can serve. They are measured alone and beside the
other's, which are several times what the server can serve, in turns. The first token counts from
when its request was due.

    python -m benchmarks.noisy_neighbour --json
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.keys import add_key
from benchmarks.open_loop import percentiles, poisson
from benchmarks.raw_load import STREAM, Answer, Flow, counts, payload, run, saturated, untyped
from benchmarks.served import Served
from benchmarks.watch import Watch
from benchmarks.workload import Workload
from mora_serve.client import Client
from mora_serve.router.features import Features, NGrams
from mora_serve.v1 import generation_pb2 as pb
from router_training.demo.loaded import ROUTER_FILE
from router_training.demo.routing import RouterRecipe, fit_demo_router
from router_training.demo.tasks import TASKS
from router_training.router import FitOptions

ROUTER = FitOptions(Features(NGrams(dim=512)), 64, strengths=(1.0,), blends=(0.33,))  # in a second
KINDS = ("base", "adapter", "routed")
QUIET, LOUD = "quiet", "loud"
NAMES = tuple(TASKS)[:4]  # of each tenant's adapters: the tasks that its prompts ask for


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--capacity-seconds", type=float, default=20.0)
    parser.add_argument("--quiet", type=float, default=0.2, help="of the capacity, as load")
    parser.add_argument("--loud", type=float, default=5.0, help="times the capacity, as load")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; 0: all cores")
    parser.add_argument("--seed", type=int, default=0)
    Workload.add_arguments(parser)
    parser.set_defaults(
        hidden=512, intermediate=1408, layers=6, vocabulary=4096, tokens=64, prompt=128
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args)
    report.emit({**result, "arguments": vars(args), "environment": report.environment()})


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Turns alone and together on one server."""
    work, rng = Workload.of(args), random.Random(args.seed)
    work.write_base(root / "base")
    paths = work.write_adapters(root / "adapters", 2 * len(NAMES))
    flags: dict[str, object] = {
        "engine.max_batch": args.batch,
        "engine.threads": args.threads,
        "adapters.max_rank": work.rank,
    }
    flags["access.file"] = file = root / "access.toml"
    keys = {tenant: add_key(file, tenant, tenant) for tenant in (QUIET, LOUD)}
    with Served(root, (), flags) as served:
        prepare(served.address, paths, root, keys)
        payloads = {kind: requests(kind, work, rng) for kind in KINDS}
        every = tuple(p for three in zip(*payloads.values(), strict=True) for p in three)
        closed = Flow(
            *("closed", every, STREAM),
            key=keys[LOUD],
            callers=2 * args.batch,
            seconds=args.capacity_seconds,
        )
        asked, _ = run(served.address, [closed])
        capacity = saturated(asked["closed"], 2 * args.batch, args.capacity_seconds)
        report.log(f"capacity {capacity:.2f} answers/s")
        alone: dict[str, list[Answer]] = {kind: [] for kind in KINDS}
        beside: dict[str, list[Answer]] = {kind: [] for kind in KINDS}
        flood: list[Answer] = []
        health: list[float] = []
        for turn in range(args.turns):
            for found, times in ((alone, 0.0), (beside, args.loud)):
                flows = quiet_flows(payloads, args.quiet * capacity, args.seconds, rng, keys[QUIET])
                if times:
                    due = poisson(times * capacity, args.seconds, rng)
                    loud = Flow(
                        *(LOUD, every, STREAM),
                        key=keys[LOUD],
                        due=tuple(due),
                        until=args.seconds + 2.0,
                    )
                    flows.append(loud)
                with Watch(served.pid, served.address) as watch:
                    asked, cpu = run(served.address, flows)
                health += watch.health_ms
                flood += asked.get(LOUD, [])
                for kind in KINDS:
                    found[kind] += asked[kind]
                report.log(
                    f"turn {turn}, {'beside' if times else 'alone'}: first tokens p50, p95 "
                    f"{_milliseconds(every_kind(asked))}; generator {cpu:.1f} s"
                )
    ratios = {kind: _p95(beside[kind]) / _p95(alone[kind]) for kind in KINDS}
    quiet = every_kind(beside)
    return {
        "capacity_per_second": capacity,
        "p95_ratio": _p95(quiet) / _p95(every_kind(alone)),
        "p95_ratio_by_kind": ratios,
        "alone_ms": {kind: _milliseconds(alone[kind]) for kind in KINDS},
        "beside_ms": {kind: _milliseconds(beside[kind]) for kind in KINDS},
        "quiet_requests": len(quiet),
        "quiet_failed": sum(a.code != "OK" for a in quiet),
        "flood_requests": len(flood),
        "flood_ended": counts(flood),
        "flood_first_token_ms": _milliseconds(flood),
        "untyped": len(untyped(flood)),
        "health_ms": percentiles([ms / 1e3 for ms in health]),
    }


def prepare(address: str, paths: Sequence[str], root: Path, keys: Mapping[str, str]) -> None:
    """Give each tenant its adapters, and the server a router for their tasks."""
    with Client(address, api_key=keys[QUIET]) as client:
        fingerprint = client.server_info().base.fingerprint
        fit_demo_router(fingerprint, RouterRecipe(16, ROUTER), root)
        client.load_router(data=(root / ROUTER_FILE).read_bytes())
    for i, tenant in enumerate((QUIET, LOUD)):
        with Client(address, api_key=keys[tenant]) as client:
            for j, name in enumerate(NAMES):
                rng = random.Random(f"{tenant} {name}")
                prompts = [TASKS[name].example(rng)[0] for _ in range(16)]
                directory = root / "adapters" / paths[len(NAMES) * i + j]
                client.upload_adapter(name, directory, tasks=[name], prompts=prompts)


def requests(kind: str, work: Workload, rng: random.Random) -> tuple[str, ...]:
    """Prompts of one length, each of a task, answered in full length."""
    made = []
    for i in range(32):
        name = NAMES[i % len(NAMES)]
        text = TASKS[name].example(rng)[0]
        text = (text + " " + text * (work.prompt // len(text)))[: work.prompt]
        if kind == "base":
            selection = pb.Selection(base=pb.BaseOnly())
        elif kind == "adapter":
            mixture = pb.Mixture(adapters=[pb.AdapterWeight(adapter=name)])
            selection = pb.Selection(mixture=mixture)
        else:
            selection = pb.Selection(auto=pb.AutoRoute())
        request = pb.GenerateStreamRequest(
            prompt=pb.Prompt(text=text),
            selection=selection,
            sampling=pb.SamplingParams(max_tokens=work.tokens, ignore_eos=True),
        )
        made.append(payload(request))
    return tuple(made)


def quiet_flows(
    payloads: Mapping[str, tuple[str, ...]],
    rate: float,
    seconds: float,
    rng: random.Random,
    key: str,
) -> list[Flow]:
    """The quiet tenant's arrivals, each of one of the kinds."""
    due = poisson(rate, seconds, rng)
    return [
        Flow(kind, payloads[kind], STREAM, key=key, due=tuple(due[i :: len(KINDS)]))
        for i, kind in enumerate(KINDS)
    ]


def every_kind(answers: Mapping[str, Sequence[Answer]]) -> list[Answer]:
    """The quiet tenant's answers, of all kinds."""
    return [answer for kind in KINDS for answer in answers[kind]]


def _first_tokens(answers: Sequence[Answer]) -> list[float]:
    return [a.first - a.due for a in answers if a.code == "OK"]


def _p95(answers: Sequence[Answer]) -> float:
    """Of the time to the first token; a request that failed took as long as it took to fail."""
    times = sorted((a.first if a.code == "OK" else a.ended) - a.due for a in answers)
    return times[int(0.95 * (len(times) - 1))]


def _milliseconds(answers: Sequence[Answer]) -> dict[str, float]:
    times = sorted(_first_tokens(answers))
    if not times:
        return {}
    return {f"p{p}": round(1e3 * times[int(p / 100 * (len(times) - 1))], 1) for p in (50, 95)}


if __name__ == "__main__":
    main()
