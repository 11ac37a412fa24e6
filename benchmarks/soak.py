"""Mixed traffic for twenty minutes: does anything grow, leak, or fail that should not?

The bundled models in a server process with an access file, an audit log and a state directory. All
the time, workers of three tenants, each with its key, generate, stream, route, name tasks, mix
adapters, register, upload, replace, update, pin and unregister adapters, leave in the middle of a
stream, let deadlines pass, and send requests that are wrong. Each call has the ends that are right
for it; any other is counted, and so is the share of those that should succeed and do. After the
warm-up, and at the end, all workers stop: descriptors and threads at rest are compared, and
pages, requests and adapters in the server's metrics have to be what they were before. Resident
memory is compared under load: after the warm-up, and at the end. A known prompt is asked at last.

    python -m benchmarks.soak --json
    python -m benchmarks.soak --minutes 2 --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import metrics, report, written
from benchmarks.keys import add_key
from benchmarks.open_loop import percentiles
from benchmarks.soak_traffic import Traffic
from benchmarks.watch import Watch
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess, free_port

TENANTS = ("soak-a", "soak-b", "soak-c")
KV_BYTES = 16 << 20  # memory of pages is taken as they are first used: few are soon used up
IDLE_SECONDS = 60.0  # until nothing may be left of the calls
REST_SECONDS = 5.0  # of a pause, in which the server is looked at
QUESTION = "reverse 'stone'"
ADAPTERS = "mora_adapters_registered"
GAUGES = {
    "mora_num_requests_running": 0.0,
    "mora_num_requests_waiting": 0.0,
    "mora_kv_cache_pages_used": 0.0,
    "mora_adapter_slots_used": 0.0,
}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=0.25, help="of the time, not compared")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report.emit({**measure(args), "arguments": vars(args), "environment": report.environment()})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Traffic for so long; figures for the claims."""
    with tempfile.TemporaryDirectory() as folder:
        return soak(Path(folder), args)


def soak(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The server with its keys and directories, and the traffic."""
    file, audit, port = root / "access.toml", root / "audit", free_port()
    bundle = bundle_path() / "adapters"
    keys = {tenant: add_key(file, tenant, tenant) for tenant in TENANTS}
    for tenant in TENANTS:
        shutil.copytree(bundle, root / "adapters" / tenant)
    flags = {
        "adapters.root": root / "adapters",
        "access.file": file,
        "access.audit": audit,
        "server.state": root / "state",
        "server.log_format": "json",
        "server.metrics_port": port,
        "engine.kv_bytes": KV_BYTES,
    }
    with (
        ServerProcess(flags) as process,
        Client(process.address, api_key=keys[TENANTS[0]]) as client,
    ):
        process.wait_until_ready(client)
        wanted = {**GAUGES, ADAPTERS: metrics.totals(port)[ADAPTERS]}
        with Watch(process.pid, process.address) as watch:
            played = play(
                partial(Traffic, process.address, keys.values(), bundle, args.seed),
                args,
                watch,
                lambda: settled(port, wanted),
            )
            traffic, (first, second) = asyncio.run(played)
        answer = client.generate(QUESTION, temperature=0.0).text
        status = process.stop()
        log = written.read(process.whole_log, ("time", "message"), [*keys.values()])
    audited = written.read(audit.read_text(), ("time", "event"), [*keys.values()])
    over = max(10.0, 6 * args.minutes)
    early = watch.resident(second.begun, second.begun + over)
    late = watch.resident(second.ended - over, second.ended)
    result = {
        "minutes": args.minutes,
        "calls": traffic.ends.total(),
        "ends": {f"{name}: {end}": c for (name, end), c in sorted(traffic.ends.items())},
        "ok_share": traffic.ok_share,
        "changes": sum(traffic.ends[name, "OK"] for name in ("churn", "upload")),
        "unexpected": sum(traffic.unexpected.values()),
        "what_unexpected": traffic.unexpected,
        "resident_growth": late / early - 1,
        "resident_mb_each_tenth": [
            round(watch.resident(*_tenth(t, second.ended)) / 1e6, 1) for t in range(10)
        ],
        "descriptors_at_rest": [first.descriptors, second.descriptors],
        "descriptors_more": max(0, second.descriptors - first.descriptors),
        "threads_at_rest": [first.threads, second.threads],
        "threads_more": max(0, second.threads - first.threads),
        "left": second.left,
        "left_over": len(second.left),
        "health_ms": percentiles([ms / 1e3 for ms in watch.health_ms]),
        "health_checks": len(watch.health_ms),
        "unhealthy": watch.unhealthy,
        "answer_afterwards": answer,
        "exit_status": status,
        "wrong_lines": len(log.wrong + audited.wrong),
        "what_wrong_lines": (log.wrong + audited.wrong)[:5],
        "audit_lines": len(audited.lines),
        "server_cpu_seconds": watch.cpu_seconds,
    }
    report.log(
        f"{result['calls']} calls, memory {result['resident_growth']:+.2%}, {first}, {second}"
    )
    return result


def _tenth(number: int, seconds: float) -> tuple[float, float]:
    return number * seconds / 10, (number + 1) * seconds / 10


@dataclass(frozen=True)
class Part:
    """A part of the traffic: when, by the watch's clock, and what the server held at rest after."""

    begun: float
    ended: float
    left: dict[str, float]
    descriptors: int
    threads: int


async def play(
    made: Callable[[], Traffic],
    args: argparse.Namespace,
    watch: Watch,
    settle: Callable[[], dict[str, float]],
) -> tuple[Traffic, list[Part]]:
    """The warm-up and the rest, each with a pause behind it, and a line of progress a minute."""
    traffic = made()
    start = time.monotonic()

    async def tell() -> None:
        while True:
            await asyncio.sleep(60)
            report.log(
                f"{(time.monotonic() - start) / 60:.0f} min: {traffic.ends.total()} calls, "
                f"{watch.samples[-1].resident / 1e6:.0f} MB, unexpected {traffic.unexpected}"
            )

    telling, parts = asyncio.create_task(tell()), []
    for share in (args.warm_up, 1 - args.warm_up):
        begun = watch.now
        await traffic.run(60 * args.minutes * share, args.workers)
        ended = watch.now
        await traffic.tidy()
        left = await asyncio.to_thread(settle)
        rest = watch.now
        await asyncio.sleep(REST_SECONDS)
        looks = [s for s in watch.samples if s.at >= rest]
        parts.append(
            Part(
                *(begun, ended, left),
                min(s.descriptors for s in looks),
                min(s.threads for s in looks),
            )
        )
    telling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await telling
    await traffic.close()
    return traffic, parts


def settled(port: int, wanted: Mapping[str, float]) -> dict[str, float]:
    """Wait until the metrics are as they have to be at rest; those that are not in time."""
    end = time.monotonic() + IDLE_SECONDS
    while True:
        found = metrics.totals(port)
        left = {name: found[name] for name, value in wanted.items() if found[name] != value}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.5)


if __name__ == "__main__":
    main()
