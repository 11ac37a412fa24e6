"""The router replaced under load: does a request fail, and which router decided what?

A real server in this process on the demo's bundle, asked over gRPC. 16 streams run one after
another, others ask Route and Generate, while LoadRouter puts two routers in each other's place 20
times; both are fitted on few prompts of the demo's tasks, from seeds of their own. Each decision is
compared with the one that its router makes alone, outside the server, from the same cards: mixture,
source and every candidate's score and probability, to the bit. A score is that of the adapter's
key, so a key made by the other router would show. At the end a router of another base is to be
refused.

    python -m benchmarks.router_swap --json
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report
from mora_serve.adapters.registry import Registry
from mora_serve.client import AsyncClient
from mora_serve.config import AdaptersConfig, Config, ServerConfig
from mora_serve.core import DEFAULT_TENANT, Decision
from mora_serve.demo.bundle import bundle_path, register_bundle
from mora_serve.errors import FailedPrecondition
from mora_serve.router.router import Router
from mora_serve.router.routing import Routing
from mora_serve.router.selection import AutoRoute, Selector
from mora_serve.server.app import MoraServer
from mora_serve.server.parts import BaseModel
from router_training.demo.loaded import ROUTER_FILE
from router_training.demo.out_of_domain import out_of_domain
from router_training.demo.routing import RouterRecipe, fit_demo_router
from router_training.demo.tasks import TASKS

SEEDS = (101, 202)  # the bundle's router has another
FEW = 16  # prompts of a task beside its card's: the routers are to differ
TEXTS = 4  # of each task, and as many of none as of all tasks
ROUTES, GENERATES = 4, 2  # that ask all the time
LEAST_DECISIONS = 20  # between two routers

Alone = Mapping[str, Mapping[str, Decision]]  # router digest -> text -> decision


@dataclass
class Seen:
    """What the calls have come to."""

    alone: Alone
    failures: list[str] = field(default_factory=list)
    decisions: dict[str, int] = field(default_factory=dict)  # by router
    wrong: int = 0
    keys: int = 0
    foreign_keys: int = 0

    def take(self, text: str, decision: Decision) -> None:
        """Compare a decision with the one that its router makes alone."""
        want = self.alone.get(decision.router_digest, {}).get(text)
        self.decisions[decision.router_digest] = self.decisions.get(decision.router_digest, 0) + 1
        self.wrong += decision != want
        known = set(want.candidates) if want else set()
        self.keys += len(decision.candidates)
        self.foreign_keys += sum(c not in known for c in decision.candidates)

    @property
    def count(self) -> int:
        """Decisions so far."""
        return sum(self.decisions.values())


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--swaps", type=int, default=20)
    args = parser.parse_args()
    report.emit(asyncio.run(measure(args.streams, args.swaps)))


async def measure(streams: int, swaps: int) -> dict[str, Any]:
    """Run the scene; figures for the claims."""
    config = Config(
        adapters=AdaptersConfig(root=str(bundle_path() / "adapters")),
        server=ServerConfig(port=0, metrics_port=-1),
    )
    async with MoraServer(config) as server, AsyncClient(server.address) as client:
        if (assembly := server._assembly) is None:
            raise RuntimeError("the server has not started")
        base, texts = assembly.base, make_texts()
        fitted = [await asyncio.to_thread(fit, base.fingerprint, seed) for seed in SEEDS]
        alone = {
            Router.load(data).digest: await asyncio.to_thread(decide_alone, data, base, texts)
            for data in fitted
        }
        first, second = alone.values()
        seen = Seen(alone)
        await client.load_router(data=fitted[-1])
        done = asyncio.Event()

        async def generate(text: str) -> Decision:
            return (await client.generate(text, max_tokens=8)).decision

        asked = [client.route] * ROUTES + [generate] * GENERATES
        calls = [
            *(stream(client, texts[i:] + texts[:i], seen, done) for i in range(streams)),
            *(ask(call, texts[i:] + texts[:i], seen, done) for i, call in enumerate(asked)),
        ]
        running = [asyncio.create_task(call) for call in calls]
        seconds, stale, meanwhile = [], 0, 0
        for i in range(swaps):
            goal = seen.count + LEAST_DECISIONS
            while seen.count < goal and not seen.failures:
                await asyncio.sleep(0.01)
            started, before = time.monotonic(), seen.count
            loaded = await client.load_router(data=fitted[i % 2])
            seconds.append(time.monotonic() - started)
            meanwhile += seen.count - before
            after = await client.route(texts[i % len(texts)])
            stale += after.router_digest != loaded.digest
            seen.take(texts[i % len(texts)], after)
            report.log(f"{i + 1} of {swaps}: {seen.count} decisions")
        refused = await refuses(client, fitted[0], texts[0], seen)
        done.set()
        await asyncio.gather(*running)
    return {
        "streams": streams,
        "swaps": swaps,
        "failures": seen.failures,
        "failed": len(seen.failures),
        "decisions": seen.count,
        "decisions_while_a_router_was_loaded": meanwhile,
        "decisions_of_the_rarer_router": min(seen.decisions.get(d, 0) for d in alone),
        "wrong_decisions": seen.wrong,
        "keys": seen.keys,
        "foreign_keys": seen.foreign_keys,
        "stale_after_loading": stale,
        "texts": len(texts),
        "texts_that_the_routers_decide_differently": sum(
            first[t].mixture != second[t].mixture for t in texts
        ),
        "keys_that_score_alike_in_both": sum(
            len(set(first[t].candidates) & set(second[t].candidates)) for t in texts
        ),
        "other_base_refused": refused,
        "load_seconds_median": statistics.median(seconds),
        "load_seconds_max": max(seconds),
        "environment": report.environment(),
    }


def make_texts() -> list[str]:
    """Prompts of every task in wordings that no fitting has seen, and prompts of none."""
    own = [prompt for task in TASKS.values() for prompt, _ in task.examples(303, TEXTS, "test")]
    rng = random.Random(303)
    other = [out_of_domain(rng, "test") for _ in own]
    return [text for pair in zip(own, other, strict=True) for text in pair]


def fit(fingerprint: str, seed: int) -> bytes:
    """A router's file for the demo's tasks, from few prompts."""
    with tempfile.TemporaryDirectory() as folder:
        fit_demo_router(fingerprint, RouterRecipe(FEW, seed=seed), Path(folder))
        return (Path(folder) / ROUTER_FILE).read_bytes()


def decide_alone(data: bytes, base: BaseModel, texts: Sequence[str]) -> dict[str, Decision]:
    """What a router decides on each text with a registry of its own, of the bundle's adapters."""
    config = Config()
    with Registry(None, config.adapters, base.shape, base.fingerprint) as registry:
        register_bundle(registry, base.shape, config.adapters)
        routing = Routing(registry, base.fingerprint)
        routing.load(data)
        selector = Selector(registry, routing, config)
        return {text: selector.decide(DEFAULT_TENANT, AutoRoute(), text) for text in texts}


async def refuses(client: AsyncClient, data: bytes, text: str, seen: Seen) -> bool:
    """Whether a router of another base is refused, and the one in use goes on deciding."""
    before = await client.get_router()
    other = dataclasses.replace(Router.load(data).content, fingerprint="0" * 64).to_bytes()
    try:
        await client.load_router(data=other)
    except FailedPrecondition as e:
        reason = e.reason
    else:
        return False
    decision = await client.route(text)
    seen.take(text, decision)
    same = await client.get_router() == before and decision.router_digest == before.digest
    return reason == "WRONG_BASE" and same


async def stream(
    client: AsyncClient, texts: Sequence[str], seen: Seen, done: asyncio.Event
) -> None:
    """Routed streams, one after another, each read to its end."""
    for text in itertools.cycle(texts):
        if done.is_set() or seen.failures:
            return
        try:
            async with await client.stream(text, max_tokens=64, ignore_eos=True) as deltas:
                seen.take(text, deltas.decision)
                count = 0
                async for delta in deltas:
                    count += len(delta.tokens)
            if count != 64:
                seen.failures.append(f"a stream ended after {count} tokens")
        except Exception as e:
            seen.failures.append(f"stream: {e}")


async def ask(
    decide: Callable[[str], Awaitable[Decision]],
    texts: Sequence[str],
    seen: Seen,
    done: asyncio.Event,
) -> None:
    """Ask for decisions, again and again."""
    for text in itertools.cycle(texts):
        if done.is_set() or seen.failures:
            return
        try:
            seen.take(text, await decide(text))
        except Exception as e:
            seen.failures.append(f"a decision: {e}")


if __name__ == "__main__":
    main()
