"""Thousands of adapters on one core: does the event loop notice?

``mora-serve serve`` in a process of its own, with a state of synthetic adapters (names with a card
of 16 example prompts each, as in ``routing``) and the demo's base and router. This process asks
over gRPC. Both share one core, the lowest that they may use. Streams run all the time: first alone,
then beside Route calls at a steady rate and adapters that are registered, at last while LoadRouter
makes new keys for all adapters besides. In each phase the server's own metrics tell the lag of its
event loop (a timer every 50 ms, how much too late it ran) and the time between two tokens of a
stream; quantiles are interpolated within a histogram's bucket, as Prometheus does.

    python -m benchmarks.router_scale --json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks import report
from benchmarks.routing import TENANT, make_cards
from mora_serve.adapters.registry import Registry
from mora_serve.adapters.validate import read_directory
from mora_serve.client import AsyncClient, Client
from mora_serve.config import AdaptersConfig
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess, free_port
from mora_serve.model.shape import shape_from_config
from mora_serve.router.router import Router

LAG = "mora_event_loop_lag_seconds"
PACE = "mora_inter_token_latency_seconds"


@dataclass(frozen=True)
class Histogram:
    """Counts of observations by upper bound, cumulated, and their sum."""

    buckets: Mapping[float, float]
    total: float

    @property
    def count(self) -> float:
        """Observations."""
        return self.buckets[float("inf")]

    @property
    def mean(self) -> float:
        """Mean observation."""
        return self.total / self.count

    def __sub__(self, before: Histogram) -> Histogram:
        buckets = {bound: n - before.buckets[bound] for bound, n in self.buckets.items()}
        return Histogram(buckets, self.total - before.total)

    def quantile(self, q: float) -> float:
        """Interpolated within its bucket; the lower bound of the last one for those beyond."""
        rank, low, below = q * self.count, 0.0, 0.0
        for bound, upto in sorted(self.buckets.items()):
            if upto >= rank and upto > below:
                if bound == float("inf"):
                    return low
                return low + (bound - low) * (rank - below) / (upto - below)
            low, below = bound, upto
        return low


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--adapters", type=int, default=5000)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--routes", type=float, default=20.0, help="Route calls a second")
    parser.add_argument("--registrations", type=float, default=1.0, help="a second")
    parser.add_argument("--seconds", type=float, default=45.0, help="of each phase")
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # Linux; elsewhere the figures are of all cores
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder)
        prepare(state, args.adapters)
        report.log("the state is ready")
        metrics_port = free_port()
        flags = {
            "server.state": state,
            "server.metrics_port": metrics_port,
            "adapters.root": bundle_path() / "adapters",
            "engine.threads": 1,
        }
        with ServerProcess(flags) as process, Client(process.address) as client:
            waited = process.wait_until_ready(client)
            report.log(f"ready after {waited:.1f} s")
            url = f"http://127.0.0.1:{metrics_port}/metrics"
            measured = asyncio.run(measure(process.address, url, args))
    report.emit(
        {
            "adapters": args.adapters,
            "streams": args.streams,
            "start_seconds": waited,
            **measured,
            "environment": report.environment(),
        }
    )


def prepare(state: Path, count: int) -> None:
    """A registry's directory with ``count`` adapters for the demo's base, and its router."""
    bundle = bundle_path()
    limits = AdaptersConfig()
    shape = shape_from_config(json.loads((bundle / "base/config.json").read_text()))
    content = read_directory(str(bundle / "adapters"), "reverse", shape, limits)
    cards = make_cards(random.Random(count))
    with Registry(state, limits, shape) as registry:
        registry.set_router(
            {"router.safetensors": (bundle / "router/router.safetensors").read_bytes()}
        )
        for i in range(count):
            registry.register(TENANT, f"adapter-{i}", content, card=next(cards))


async def measure(address: str, url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both phases; figures for the claims."""
    failures: list[str] = []
    async with AsyncClient(address) as client:
        streaming = [asyncio.create_task(stream(client, i, failures)) for i in range(args.streams)]
        routes, registrations = Asked(), Asked()
        try:
            await asyncio.sleep(3.0)
            alone = await phase(url, asyncio.sleep(args.seconds))
            report.log(f"alone: {alone}")
            asking = [
                asyncio.create_task(ask_routes(client, args.routes, routes, failures)),
                asyncio.create_task(
                    ask_registrations(client, args.registrations, registrations, failures)
                ),
            ]
            busy = await phase(url, asyncio.sleep(args.seconds))
            report.log(f"routing: {busy}")
            rate, registered = len(routes.seconds) / args.seconds, len(registrations.seconds)
            loading = await phase(url, client.load_router(data=other_router(), timeout=1200.0))
            report.log(f"loading: {loading}")
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            at_the_end = (await client.server_info()).adapters
        finally:
            for task in streaming:
                task.cancel()
            await asyncio.gather(*streaming, return_exceptions=True)
    return {
        "alone": alone,
        "routing": busy,
        "loading": loading,
        "pace_factor": busy["inter_token_ms"] / alone["inter_token_ms"],
        "routes_a_second": rate,
        "route_ms_median": 1e3 * statistics.median(routes.seconds),
        "route_ms_p99": 1e3 * statistics.quantiles(routes.seconds, n=100)[98],
        "registrations": registered,
        "registration_ms_median": 1e3 * statistics.median(registrations.seconds),
        "adapters_at_the_end": at_the_end,
        "failures": failures,
        "failed": len(failures),
    }


class Asked:
    """How long the calls of one kind took, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []


def other_router() -> bytes:
    """The bundle's router under another digest: all keys are made anew for it."""
    data = (bundle_path() / "router/router.safetensors").read_bytes()
    return dataclasses.replace(Router.load(data).content, report={"copy": 1.0}).to_bytes()


async def phase(url: str, work: Awaitable[object]) -> dict[str, float]:
    """What the server's metrics say of the time that ``work`` takes."""
    before, started = await asyncio.to_thread(scrape, url), time.monotonic()
    await work
    seconds = time.monotonic() - started
    after = await asyncio.to_thread(scrape, url)
    lag, pace = (after[name] - before[name] for name in (LAG, PACE))
    return {
        "seconds": seconds,
        "lag_ms_p50": 1e3 * lag.quantile(0.5),
        "lag_ms_p99": 1e3 * lag.quantile(0.99),
        "lag_ms_mean": 1e3 * lag.mean,
        "lag_ms_most": 1e3 * min(b for b, n in lag.buckets.items() if n == lag.count),
        "lag_samples": lag.count,
        "inter_token_ms": 1e3 * pace.mean,
        "inter_token_ms_p99": 1e3 * pace.quantile(0.99),
        "tokens": pace.count,
    }


def scrape(url: str) -> dict[str, Histogram]:
    """The server's histograms that count here."""
    text = urllib.request.urlopen(url, timeout=10).read().decode()  # noqa: S310 - our own server
    found = {}
    for family in text_string_to_metric_families(text):
        if family.name in (LAG, PACE):
            buckets = {
                float(s.labels["le"]): s.value for s in family.samples if s.name.endswith("_bucket")
            }
            (total,) = (s.value for s in family.samples if s.name.endswith("_sum"))
            found[family.name] = Histogram(buckets, total)
    return found


async def stream(client: AsyncClient, i: int, failures: list[str]) -> None:
    """Streams of an adapter or of the base, one after another."""
    adapters = {f"adapter-{i}": 1.0} if i % 2 else {}
    for number in itertools.count():
        try:
            async with await client.stream(
                f"stream {i} {number}", adapters=adapters, max_tokens=150, ignore_eos=True
            ) as deltas:
                async for _ in deltas:
                    pass
        except Exception as e:
            failures.append(f"stream: {e}")
            return


async def ask_routes(client: AsyncClient, rate: float, asked: Asked, failures: list[str]) -> None:
    """Route calls at a steady rate, whether earlier ones have been answered or not."""
    cards = make_cards(random.Random(0))
    texts = [*(e.prompt for e in read_examples(bundle_path())), *next(cards).prompts]
    pending: set[asyncio.Task[None]] = set()

    async def one(text: str) -> None:
        started = time.monotonic()
        try:
            await client.route(text)
            asked.seconds.append(time.monotonic() - started)
        except Exception as e:
            failures.append(f"route: {e}")

    start = time.monotonic()
    for i in itertools.count():
        task = asyncio.create_task(one(texts[i % len(texts)]))
        pending.add(task)
        task.add_done_callback(pending.discard)
        await asyncio.sleep(start + (i + 1) / rate - time.monotonic())


async def ask_registrations(
    client: AsyncClient, rate: float, asked: Asked, failures: list[str]
) -> None:
    """Adapters registered one after another, with example prompts of their own."""
    cards = make_cards(random.Random(1))
    start = time.monotonic()
    for i in itertools.count():
        started = time.monotonic()
        try:
            await client.register_adapter(f"new-{i}", "reverse", prompts=next(cards).prompts)
            asked.seconds.append(time.monotonic() - started)
        except Exception as e:
            failures.append(f"registration: {e}")
        await asyncio.sleep(start + (i + 1) / rate - time.monotonic())


if __name__ == "__main__":
    main()
