"""The pace of running streams while 50 adapters are registered and used within 10 seconds.

16 streams run on a Llama of 100M parameters in NF4 (or another size by flags): a quarter on the
base, half on one adapter, a quarter on a mixture of two. They begin anew in every round, which has
a quiet window and a busy one, now the one first and now the other. In the busy one an adapter that
the server has never seen is registered every 0.16 seconds, whether the last is done or not, and
used at once for an answer of 8 tokens, which fails where it comes after the window's end; there are
fewer slots than adapters. What counts are the
times between two messages of a stream, as the client sees them over gRPC; of the rounds'
percentiles and ratios the median.

    python -m benchmarks.residency --json

``hot_registration`` asks instead whether any stream stands still for some steps, on any machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import memory, report
from benchmarks.many_adapters import Template
from benchmarks.open_loop import percentiles, streamed
from mora_serve.client import AsyncClient, Client
from mora_serve.demo.process import ServerProcess
from mora_serve.errors import MoraError
from mora_serve.model.shape import PROJECTIONS, shape_from_config

LASTING = 8  # adapters of the streams
LENGTH = 2000  # tokens of a stream: more than come in a round
PERCENTILES = [*range(99), *(99 + i / 10 for i in range(10))]  # of the curve
SETTLE_SECONDS = 1.0  # before each window
ARRIVALS = 0.8  # the part of a busy window in which adapters arrive, so that the last is used in it


@dataclass
class Scene:
    """What the streams and the registrations have noted; times are ``perf_counter`` seconds."""

    gaps: list[tuple[float, float]] = field(default_factory=list)  # (when it ended, seconds)
    used: list[float] = field(default_factory=list)  # from a registration's due time to its answer
    errors: list[str] = field(default_factory=list)

    def within(self, start: float, end: float) -> list[float]:
        """The gaps that ended in a window."""
        return [gap for when, gap in self.gaps if start < when <= end]


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=50, help="of each busy window")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each window")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write(root, args)
        flags = {
            "base.model": root / "base",
            "adapters.root": root / "adapters",
            "adapters.slots": args.slots,
        }
        with ServerProcess(flags) as server:
            with Client(server.address, timeout=600.0) as client:
                server.wait_until_ready(client)
                for i in range(LASTING):
                    client.register_adapter(f"old-{i}", f"old-{i}")
            rounds, scene = asyncio.run(measure(server.address, args))
    result = summary(rounds, scene)
    report.log(f"ms between messages: quiet {result['quiet_ms']}, busy {result['busy_ms']}")
    report.emit({**result, "arguments": vars(args), "environment": report.environment()})


def write(root: Path, args: argparse.Namespace) -> None:
    """The base, the adapters of the streams, and new ones for every round."""
    config = memory.llama_config(args.hidden, args.intermediate, args.layers, args.vocabulary)
    (root / "base").mkdir()
    memory.write_model(root / "base", config)
    template = Template(shape_from_config(config), args.rank, PROJECTIONS)
    names = [f"old-{i}" for i in range(LASTING)]
    names += [f"new-{turn}-{i}" for turn in range(args.repeat) for i in range(args.adapters)]
    for seed, name in enumerate(names):
        template.write(root / "adapters" / name, seed)


async def measure(
    address: str, args: argparse.Namespace
) -> tuple[list[dict[str, list[float]]], Scene]:
    """Each round's gaps, quiet and busy, and what was noted."""
    scene, rounds = Scene(), []
    async with AsyncClient(address, timeout=600.0) as client:
        for turn in range(args.repeat):
            begun = len(scene.gaps)
            tasks = [
                asyncio.create_task(stream(client, i, args, scene)) for i in range(args.streams)
            ]
            while len(scene.gaps) < begun + 4 * args.streams and not scene.errors:
                await asyncio.sleep(0.05)
            gaps: dict[str, list[float]] = {}
            for kind in ("quiet", "busy") if turn % 2 == 0 else ("busy", "quiet"):
                await asyncio.sleep(SETTLE_SECONDS)
                start = time.perf_counter()
                names = [f"new-{turn}-{i}" for i in range(args.adapters if kind == "busy" else 0)]
                await arrivals(client, names, args.seconds, scene)
                await asyncio.sleep(max(0.0, start + args.seconds - time.perf_counter()))
                gaps[kind] = scene.within(start, start + args.seconds)
                for name in names:
                    with contextlib.suppress(MoraError):  # its registration may have failed
                        await client.unregister_adapter(name)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            rounds.append(gaps)
            report.log(f"round {turn}: { ({k: percentiles(g) for k, g in gaps.items()}) }")
    return rounds, scene


async def arrivals(client: AsyncClient, names: Sequence[str], seconds: float, scene: Scene) -> None:
    """Register and use an adapter after another at equal intervals; returns when all are done."""
    start = time.perf_counter()

    async def use(name: str, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        try:
            await client.register_adapter(name, name)
            answer = await client.generate(
                token_ids=list(range(4, 20)),
                adapters={name: 1.0},
                max_tokens=8,
                temperature=0.0,
                ignore_eos=True,
            )
        except MoraError as e:
            scene.errors.append(f"{name}: {e}")
            return
        now = time.perf_counter()
        if len(answer.tokens) != 8:
            scene.errors.append(f"{name}: {len(answer.tokens)} tokens")
        if now > start + seconds:
            scene.errors.append(f"{name}: its answer came {now - start - seconds:.2f} s too late")
        scene.used.append(now - due)

    async with asyncio.TaskGroup() as tasks:
        for i, name in enumerate(names):
            tasks.create_task(use(name, start + i * ARRIVALS * seconds / len(names)))


async def stream(client: AsyncClient, i: int, args: argparse.Namespace, scene: Scene) -> None:
    """One long stream; notes the seconds between its messages with tokens."""
    rng = random.Random(i)
    one, two = f"old-{i % LASTING}", f"old-{(i + 1) % LASTING}"
    mixture = ({}, {one: 1.0}, {one: 0.6, two: 0.5}, {one: 1.0})[i % 4]
    options = {
        "token_ids": [rng.randrange(4, args.vocabulary) for _ in range(32)],
        "adapters": mixture or None,
        "base": not mixture,
        "max_tokens": LENGTH,
        "ignore_eos": True,
    }
    last = None
    try:
        async for tokens in streamed(client, options):
            now = time.perf_counter()
            if tokens and last is not None:
                scene.gaps.append((now, now - last))
            last = now if tokens else last
    except MoraError as e:
        scene.errors.append(f"stream {i}: {e}")
    else:
        scene.errors.append(f"stream {i} ended within the round; lower --seconds")


def summary(rounds: Sequence[dict[str, list[float]]], scene: Scene) -> dict[str, Any]:
    """Medians over the rounds: percentiles in milliseconds, and ratios, busy to quiet.

    The curve is of all rounds' gaps together.
    """
    per_round = [{kind: percentiles(gaps) for kind, gaps in gaps.items()} for gaps in rounds]
    keys = list(per_round[0]["quiet"])
    medians = {
        kind: {key: statistics.median(r[kind][key] for r in per_round) for key in keys}
        for kind in ("quiet", "busy")
    }
    ratios = {
        key: statistics.median(r["busy"][key] / r["quiet"][key] for r in per_round) for key in keys
    }
    return {
        "percentiles": PERCENTILES,
        "curve_ms": {
            kind: np.percentile(
                np.concatenate([gaps[kind] for gaps in rounds]) * 1e3, PERCENTILES
            ).tolist()
            for kind in ("quiet", "busy")
        },
        "quiet_ms": medians["quiet"],
        "busy_ms": medians["busy"],
        "ratio": ratios,
        "rounds": per_round,
        "registered_and_used": len(scene.used),
        "register_and_use_ms": percentiles(scene.used),
        "errors": scene.errors,
        "failed": len(scene.errors),
    }


if __name__ == "__main__":
    main()
