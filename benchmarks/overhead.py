"""What is not the model: gRPC streaming, routing, start-up, and memory by part.

- Streaming: 16 streams through gRPC against the same engine driven step by step in this process, on
  the workload of ``throughput``; both take turns, medians count.
- Routing: the first token of a streamed answer where the router picks among 1,000 adapters, against
  the same answer with the mixture given; pairs in turn, one request at a time, on the demo's base.
- Start-up: from ``mora-serve serve`` on the bundled models to the first whole answer.
- Memory: what each part of a server on the workload's base holds.

    python -m benchmarks.overhead --json
    python -m benchmarks.overhead --parts routing startup
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import footprint, report
from benchmarks.local import Job, LocalEngine
from benchmarks.open_loop import percentiles
from benchmarks.router_scale import prepare
from benchmarks.served import Served
from benchmarks.workload import Mixtures, Workload, mixtures
from mora_serve.cli.output import table
from mora_serve.client import Client
from mora_serve.client.requests import GenerateOptions
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.core import Mixture, SamplingParams, Source
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess

PARTS = ("streaming", "routing", "startup", "memory")


def main() -> None:
    """Measure, print a table, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--adapters", type=int, default=1000, help="that are routed among")
    parser.add_argument("--pairs", type=int, default=200, help="of routed and given mixtures")
    parser.add_argument("--starts", type=int, default=5)
    Workload.add_arguments(parser)
    args = parser.parse_args()
    work = Workload.of(args)
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "memory": lambda root: footprint.memory_by_part(root, work, args.streams),
        "streaming": lambda root: streaming(root, work, args.streams, args.repeat),
        "routing": lambda root: routing(root, args.adapters, args.pairs),
        "startup": lambda _: footprint.startup(args.starts),
    }
    result: dict[str, Any] = {}
    for name, measure in parts.items():
        if name in args.parts:
            with tempfile.TemporaryDirectory() as folder:
                result[name] = measure(Path(folder))
            report.log(f"{name}: {result[name]}")
    report.log(as_table(result))
    report.emit({**result, "arguments": vars(args), "environment": report.environment()})


def streaming(root: Path, work: Workload, streams: int, repeat: int) -> dict[str, Any]:
    """Tokens a second both ways, without and with distinct adapters; the share lost to gRPC."""
    work.write_base(root / "base")
    names = work.write_adapters(root / "adapters", streams)
    config = Config(
        BaseConfig(str(root / "base")),
        EngineConfig(prefix_cache=False),
        AdaptersConfig(slots=max(32, streams), max_rank=work.rank),
    )
    flags = {"adapters.max_rank": work.rank, "adapters.slots": max(32, streams)}
    found: dict[str, Any] = {"streams": streams, "new_tokens": work.tokens}
    with LocalEngine(config) as local, Served(root, names, flags) as served:
        for name in names:
            local.register(name, root / "adapters", name)
        for kind, wanted in {
            "none": mixtures(streams, 1, 0),
            "distinct": mixtures(streams, streams, 1),
        }.items():
            rates: dict[str, list[float]] = {"streamed": [], "in_process": []}
            for turn in range(-1, repeat):
                prompts = work.prompts(streams, turn)
                tokens = work.tokens if turn >= 0 else min(8, work.tokens)  # the first one warms up
                streamed = served.run(prompts, wanted, tokens).rate()
                direct = in_process(local, prompts, wanted, tokens)
                if turn >= 0:
                    rates["streamed"].append(streamed)
                    rates["in_process"].append(direct)
                    report.log(f"{kind}: {streamed:.1f} streamed, {direct:.1f} in-process")
            medians = {way: statistics.median(measured) for way, measured in rates.items()}
            lost = 1 - medians["streamed"] / medians["in_process"]
            found[kind] = {**medians, "lost": lost, "runs": rates}
    found["most_lost"] = max(found[kind]["lost"] for kind in ("none", "distinct"))
    return found


def in_process(
    local: LocalEngine, prompts: Sequence[Sequence[int]], wanted: Mixtures, tokens: int
) -> float:
    """Tokens a second of the engine, driven here."""
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    jobs: list[Job] = [(p, m, sampling) for p, m in zip(prompts, wanted, strict=True)]
    start = time.perf_counter()
    answers = local.generate(jobs)
    return sum(map(len, answers)) / (time.perf_counter() - start)


def routing(root: Path, adapters: int, pairs: int) -> dict[str, Any]:
    """First tokens in milliseconds, routed and with the same mixture given, and their difference.

    Without a prefix cache: the second of a pair would find the first one's pages.
    """
    prepare(root / "state", adapters)
    texts = [e.prompt for e in read_examples(bundle_path())]
    flags = {
        "server.state": root / "state",
        "adapters.root": bundle_path() / "adapters",
        "engine.prefix_cache": False,
    }
    routed: list[float] = []
    given: list[float] = []
    sources: set[Source] = set()
    with ServerProcess(flags) as process, Client(process.address) as client:
        process.wait_until_ready(client)
        for i in range(-10, pairs):  # the first ones warm up
            text = texts[i % len(texts)]
            decision = client.route(text)
            sources.add(decision.source)
            ways = [(routed, None), (given, decision.mixture)]
            for seconds, mixture in ways if i % 2 else reversed(ways):
                took = first_token(client, text, mixture)
                if i >= 0:
                    seconds.append(took)
    more = [1e3 * (a - b) for a, b in zip(routed, given, strict=True)]
    return {
        "adapters": adapters,
        "pairs": pairs,
        "routed_ms": percentiles(routed),
        "given_ms": percentiles(given),
        "first_token_ms": statistics.median(more),
        "first_token_ms_quartiles": statistics.quantiles(more, n=4),
        "sources": sorted(source.value for source in sources),
    }


def first_token(client: Client, text: str, mixture: Mixture | None) -> float:
    """Seconds to a streamed answer's first token; None leaves the choice to the router."""
    options: GenerateOptions = {"max_tokens": 2, "ignore_eos": True}
    if mixture is not None:
        options |= {"adapters": mixture} if mixture.adapters else {"base": True}
    start = time.perf_counter()
    with client.stream(text, **options) as deltas:
        next(iter(deltas))
        return time.perf_counter() - start


def as_table(result: dict[str, Any]) -> str:
    """The figures for people."""
    rows = []
    if "streaming" in result:
        for kind in ("none", "distinct"):
            r = result["streaming"][kind]
            rows.append((f"tokens/s in-process, adapters: {kind}", f"{r['in_process']:.1f}"))
            rows.append((f"tokens/s streamed, adapters: {kind}", f"{r['streamed']:.1f}"))
    if "routing" in result:
        part = result["routing"]["first_token_ms"]
        rows.append(("routing's part of the first token, ms", f"{part:.2f}"))
    if "startup" in result:
        rows.append(("first answer after the start, s", f"{result['startup']['seconds']:.2f}"))
    for name, size in result.get("memory", {}).get("bytes", {}).items():
        rows.append((f"memory, {name}, MB", f"{size / 1e6:.1f}"))
    return table(("", ""), rows, right=(1,))


if __name__ == "__main__":
    main()
