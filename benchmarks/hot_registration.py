"""Running streams while adapters are registered and used: does any of them fail or stand still?

A real server in this process, asked over gRPC. 16 streams run: a third on the base, a third on an
adapter, a third on a mixture of two. First they run alone: the baseline. Then 20 adapters are
registered one after another with example prompts, and each is used at once: 20 windows. There are
fewer slots than adapters. In each window counts the worst stream's longest time between two of its
tokens, in steps: a step is the median step during all windows, so that a busy machine, which
stretches every step, does not decide. Also counted are the steps of the engine in which a running
stream got nothing.

    python -m benchmarks.hot_registration --json
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import heapq
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import families, oracle, report
from mora_serve.client import AsyncClient, Result
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig, ServerConfig
from mora_serve.core import AdapterLoad, Event
from mora_serve.engine.engine import Engine
from mora_serve.server.app import MoraServer

ALONE_STEPS, ALONE_SECONDS = 60, 1.5


class Recorder:
    """Notes, step by step, which requests got tokens; wraps the engine's own step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, frozenset[str]]] = []
        self._step = Engine.step

    def __enter__(self) -> Recorder:
        step = self._step

        def recorded(engine: Engine) -> list[Event | AdapterLoad]:
            events = step(engine)
            got = frozenset(e.request_id for e in events if isinstance(e, Event) and e.tokens)
            if got:
                self.steps.append((time.monotonic(), got))
            return events

        Engine.step = recorded  # type: ignore[method-assign,assignment]
        return self

    def __exit__(self, *exc: object) -> None:
        Engine.step = self._step  # type: ignore[method-assign]


def longest_gaps(
    steps: Sequence[tuple[float, frozenset[str]]],
    prefix: str,
    start: float = -math.inf,
    end: float = math.inf,
) -> tuple[int, float]:
    """The most steps between two tokens of one request so named, and the most seconds.

    ``steps`` are (time, requests that got tokens). Every gap that lies in start..end, even with a
    part of it, counts in full.
    """
    missed, seconds = 0, 0.0
    last: dict[str, tuple[int, float]] = {}
    for i, (now, got) in enumerate(steps):
        for request in (r for r in got if r.startswith(prefix)):
            before, then = last.get(request, (i, now))
            last[request] = i, now
            if then < end and now > start and before < i:
                missed, seconds = max(missed, i - before - 1), max(seconds, now - then)
    return missed, seconds


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512}
        model = families.make_base("llama3", root / "base", max_position_embeddings=4096, **sizes)
        lasting = {f"old-{i}": {"r": 16, "lora_alpha": 16} for i in range(4)}
        new = {f"new-{i}": {"r": 16, "lora_alpha": 16} for i in range(args.adapters)}
        oracle.make_adapters(copy.deepcopy(model), root / "adapters", lasting | new)
        report.emit(asyncio.run(measure(root, args.streams, list(lasting), list(new))))


async def measure(
    root: Path, streams: int, lasting: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """Run the scene; figures for the claims. ``lasting`` are the four adapters of the streams."""
    slots = (len(lasting) + len(names)) // 2
    config = Config(
        BaseConfig(str(root / "base"), device="cpu"),
        EngineConfig(max_tokens=4000),
        AdaptersConfig(root=str(root / "adapters"), slots=slots),
        server=ServerConfig(port=0, metrics_port=-1),
    )
    one, two, three, four = lasting
    mixtures: list[dict[str, float]] = [
        *({}, {one: 1.0}, {one: 0.6, two: 0.5}),
        *({}, {three: 1.0}, {three: 0.7, four: -0.4}),
    ]
    failures: list[str] = []
    done = asyncio.Event()
    with Recorder() as recorder:
        steps = recorder.steps
        async with MoraServer(config) as server, AsyncClient(server.address) as client:
            for name in lasting:
                await client.register_adapter(name, name)
            base = (await use(client)).tokens
            tasks = [
                asyncio.create_task(stream(client, i, mixtures[i % len(mixtures)], done, failures))
                for i in range(streams)
            ]
            while not failures and (not steps or len(steps[-1][1]) < streams):
                await asyncio.sleep(0.05)
            alone, first = time.monotonic(), len(steps)
            while time.monotonic() - alone < ALONE_SECONDS or len(steps) - first < ALONE_STEPS:
                await asyncio.sleep(0.05)
            windows, answered = [time.monotonic()], 0
            for name in names:
                prompts = [f"{name} prompt {i}" for i in range(16)]
                await client.register_adapter(name, name, prompts=prompts, tasks=[name])
                answer = (await use(client, name)).tokens
                answered += len(answer) == len(base) and answer != base
                windows.append(time.monotonic())
            # A pause that began in the last window counts in full, so wait for its end.
            after = len(steps)
            while not failures and len(steps) < after + 5:
                await asyncio.sleep(0.05)
            done.set()
            await asyncio.gather(*tasks)
    baseline = step_seconds(steps, alone, windows[0])
    step = statistics.median(step_seconds(steps, windows[0], windows[-1]))
    pauses = [longest_gaps(steps, "stream-", *window)[1] for window in itertools.pairwise(windows)]
    return {
        "streams": streams,
        "streams_by_adapters": {
            str(n): sum(len(mixtures[i % len(mixtures)]) == n for i in range(streams))
            for n in (0, 1, 2)
        },
        "slots": slots,
        "adapters": len(lasting) + len(names),
        "registered": len(names),
        "answered": answered,
        "failures": failures,
        "failed": len(failures),
        "max_missed_steps": longest_gaps(steps, "stream-", windows[0], windows[-1])[0],
        "baseline_steps": len(baseline),
        "baseline_step_median_seconds": statistics.median(baseline),
        "baseline_step_p99_seconds": statistics.quantiles(baseline, n=100, method="inclusive")[98],
        "baseline_step_max_seconds": max(baseline),
        "baseline_max_pause_seconds": longest_gaps(steps, "stream-", alone, windows[0])[1],
        "median_step_seconds": step,
        "max_pause_seconds": max(pauses),
        "window_pause_seconds": pauses,
        "max_pause_in_steps": max(pauses) / step,
        "third_worst_pause_in_steps": heapq.nlargest(3, pauses)[-1] / step,
        "seconds_per_registration_and_use": (windows[-1] - windows[0]) / len(names),
        "environment": report.environment(),
    }


def step_seconds(
    steps: Sequence[tuple[float, frozenset[str]]], start: float, end: float
) -> list[float]:
    """Seconds of each step that lies in start..end."""
    times = [now for now, _ in steps if start <= now <= end]
    return [b - a for a, b in itertools.pairwise(times)]


async def use(client: AsyncClient, name: str = "") -> Result:
    """Eight greedy tokens of an adapter, or of the base."""
    return await client.generate(
        "use it",
        adapters={name: 1.0} if name else None,
        base=not name,
        max_tokens=8,
        temperature=0.0,
        ignore_eos=True,
    )


async def stream(
    client: AsyncClient,
    i: int,
    mixture: Mapping[str, float],
    done: asyncio.Event,
    failures: list[str],
) -> None:
    """One long stream, read until ``done``; it must not have ended by itself before."""
    try:
        async with await client.stream(
            f"stream {i}",
            adapters=mixture or None,
            base=not mixture,
            max_tokens=3900,
            ignore_eos=True,
            request_id=f"stream-{i}",
        ) as deltas:
            async for _ in deltas:
                if done.is_set():
                    return
        failures.append(f"stream {i} ended before the registrations did")
    except Exception as e:
        failures.append(f"stream {i}: {e}")


if __name__ == "__main__":
    main()
