"""How long the router takes among many adapters, and how long it takes one in.

The demo's router and base; the adapters are names with a card of 16 example prompts each. One
core. Routing is timed as a request meets it, from the text to the decision with digests: features,
scores, choice and the registry's check of what was chosen.

    python -m benchmarks.routing --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import report
from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.registry import Registry
from mora_serve.adapters.validate import read_directory
from mora_serve.config import AdaptersConfig, Config
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.model.shape import shape_from_config
from mora_serve.router.index import Index
from mora_serve.router.keys import entry_of
from mora_serve.router.routing import Routing
from mora_serve.router.selection import AutoRoute, Selector

TENANT = "default"
CARD_PROMPTS = 16


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--adapters", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--registrations", type=int, default=50)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # Linux; elsewhere nothing that is timed takes a thread
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = [measure(n, args.requests, args.registrations) for n in sorted(args.adapters)]
    report.log(f"{'adapters':>8} {'routing ms':>10} {'p99':>6} {'taking in':>9} {'keys MB':>8}")
    for row in rows:
        report.log(
            f"{row['adapters']:>8} {row['routing_ms']:>10.2f} {row['routing_p99_ms']:>6.2f} "
            f"{row['registration_ms']:>9.2f} {row['key_bytes'] / 1e6:>8.2f}"
        )
    report.emit(
        {
            "rows": rows,
            "by_adapters": {str(row["adapters"]): row for row in rows},
            "environment": report.environment(),
        }
    )


def measure(count: int, requests: int, registrations: int) -> dict[str, Any]:
    """One row: medians in milliseconds with ``count`` adapters registered."""
    bundle = bundle_path()
    limits = AdaptersConfig(max_adapters=count + registrations)
    shape = shape_from_config(json.loads((bundle / "base/config.json").read_text()))
    content = read_directory(str(bundle / "adapters"), "reverse", shape, limits)
    cards = make_cards(random.Random(count))
    with Registry(None, limits, shape, snapshot_every=1 << 20) as registry:
        registry.set_router(
            {"router.safetensors": (bundle / "router/router.safetensors").read_bytes()}
        )
        for i in range(count):
            registry.register(TENANT, f"adapter-{i}", content, card=next(cards))
            if (i + 1) % 2000 == 0:
                report.log(f"{i + 1} registered")
        started = time.perf_counter()
        routing = Routing(registry, "")
        rebuilt = time.perf_counter() - started
        if (snapshot := routing.snapshot) is None:
            raise RuntimeError("the bundle's router was not taken in")
        selector = Selector(registry, routing, Config(adapters=limits))
        texts = [*(e.prompt for e in read_examples(bundle)), *next(cards).prompts]
        routed = timed(
            lambda i: selector.decide(TENANT, AutoRoute(), texts[i % len(texts)]), requests
        )
        record = registry.get(TENANT, "adapter-0")
        index: Index = snapshot.index

        def take_in(i: int) -> None:
            nonlocal index
            new = dataclasses.replace(record, name=f"new-{i}", card=next(cards))
            entry = entry_of(snapshot.router, new)
            if entry is not None:
                index = index.put(TENANT, entry)

        taken = timed(take_in, registrations)
        if len(index) < count + registrations:
            raise RuntimeError(f"{len(index)} keys, fewer than {count + registrations}")
        return {
            "adapters": count,
            "routing_ms": 1e3 * statistics.median(routed),
            "routing_p99_ms": 1e3 * statistics.quantiles(routed, n=100)[98],
            "registration_ms": 1e3 * statistics.median(taken),
            "all_keys_seconds": rebuilt,
            "key_bytes": snapshot.index.nbytes,
        }


def timed(work: Callable[[int], object], times: int) -> list[float]:
    """Seconds of each of ``times`` calls, after a few that do not count."""
    for i in range(min(5, times)):
        work(-1 - i)
    seconds = []
    for i in range(times):
        started = time.perf_counter()
        work(i)
        seconds.append(time.perf_counter() - started)
    return seconds


def make_cards(rng: random.Random) -> Iterator[RoutingCard]:
    """Cards of adapters that do different things: each has verbs and nouns of its own."""

    def word() -> str:
        return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))

    while True:
        verbs, nouns = [word() for _ in range(3)], [word() for _ in range(4)]
        prompts = {
            f"please {rng.choice(verbs)} the {rng.choice(nouns)} of '{word()}'"
            for _ in range(2 * CARD_PROMPTS)
        }
        yield RoutingCard(prompts=tuple(sorted(prompts)[:CARD_PROMPTS]))


if __name__ == "__main__":
    main()
