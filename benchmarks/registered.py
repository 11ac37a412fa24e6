"""Throughput against registered adapters: 2,000 with 32 slots beside 32 that all have one.

A Llama of 100M parameters in NF4 (or another size by flags), small adapters of rank 4 to 8 on all
or some projections, prompts of 32 and answers of 64 tokens, streamed over gRPC. One server for each
number of adapters, all started before the first round; they take turns, and the median of the
rounds counts. Saturated: twice as many clients as the server's batch has places, so that a line of
requests waits; the rate is of the time in which all clients are busy. Then Poisson arrivals, at a
part of the rate that the first of ``--compare`` reached when saturated. Adapters are asked for
uniformly, or by Zipf's law: the i-th in proportion to 1/i.

    python -m benchmarks.registered --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import many_adapters, memory, report
from benchmarks.closed_loop import saturate
from benchmarks.open_loop import play, poisson, popularity, streamed, summary
from mora_serve.client import AsyncClient, Client
from mora_serve.config import AdaptersConfig
from mora_serve.demo.process import ServerProcess, free_port
from mora_serve.model.shape import shape_from_config

KINDS = ("zipf", "uniform")
COUNTERS = ("hits", "misses", "evictions")


class Server:
    """A server process with so many adapters registered."""

    def __init__(self, base: Path, state: Path, count: int, args: argparse.Namespace) -> None:
        self.names = list(many_adapters.names(count))
        self._metrics = free_port()
        flags = {
            "base.model": base,
            "server.state": state,
            "adapters.slots": args.slots,
            "engine.max_batch": args.batch,
            "server.metrics_port": self._metrics,
        }
        self.process = ServerProcess(flags)

    def wait(self) -> None:
        """Return when it serves."""
        with Client(self.process.address, timeout=600.0) as client:
            self.process.wait_until_ready(client)

    def counters(self) -> dict[str, float]:
        """Adapters found in slots, loaded, and evicted, so far."""
        time.sleep(0.2)  # the engine's snapshots are up to 0.1 s old
        address = f"http://127.0.0.1:{self._metrics}/metrics"
        with urllib.request.urlopen(address, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values = dict(line.split(" ")[:2] for line in lines if line.startswith("mora_adapter_slot"))
        return {name: float(values[f"mora_adapter_slot_{name}_total"]) for name in COUNTERS}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's; ends the process for what cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--compare", type=int, nargs=2, default=[32, 2000], metavar="N")
    parser.add_argument("--points", type=int, nargs="*", default=[5, 128, 500], metavar="N")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=112, help="of each saturated round")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of the two compared")
    parser.add_argument("--point-repeat", type=int, default=1, help="rounds of the other points")
    parser.add_argument("--poisson-seconds", type=float, default=15.0)
    parser.add_argument("--poisson-share", type=float, default=0.7, help="of the saturated rate")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = parser.parse_args(argv)
    if args.requests < 3 * args.clients:  # fewer leave no time in which all clients are busy
        parser.error("--requests: give at least three times as many as --clients")
    return args


def main() -> None:
    """Measure, print a table, report."""
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(Path(folder), args)
    for row in result["saturated"]:
        report.log(
            f"{row['popularity']:>8} {row['adapters']:>6} {row['tokens_per_second']:>8.1f} tokens/s"
            f"  {row['misses_per_request']:.2f} loads a request"
            f"  first token p50 {row['first_token_ms']['p50']:.0f} ms"
            f", p99 {row['first_token_ms']['p99']:.0f} ms"
        )
    report.emit({**result, "arguments": vars(args), "environment": report.environment()})


def compare(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, on servers that run side by side, one asked at a time."""
    config = memory.llama_config(args.hidden, args.intermediate, args.layers, args.vocabulary)
    (root / "base").mkdir()
    memory.write_model(root / "base", config)
    counts = sorted({*args.compare, *args.points})
    started = time.monotonic()
    limits = AdaptersConfig(max_adapters=max(counts))
    shape = shape_from_config(config)
    for count in counts:
        many_adapters.register(root / f"state-{count}", shape, count, limits)
    report.log(f"{sum(counts)} adapters made in {time.monotonic() - started:.0f} s")
    with contextlib.ExitStack() as stack:
        servers = {}
        for count in counts:
            servers[count] = Server(root / "base", root / f"state-{count}", count, args)
            stack.enter_context(servers[count].process)
            servers[count].wait()
        set_up = time.monotonic() - started
        report.log(f"{len(counts)} servers ready after {set_up:.0f} s")
        saturated = [row for kind in KINDS for row in rounds(servers, kind, args)]
        rates = {(row["popularity"], row["adapters"]): row for row in saturated}
        few, many = args.compare
        per_second = min(rates[k, few]["tokens_per_second"] for k in KINDS) / args.tokens
        arrivals = [
            arriving(servers[count], kind, per_second * args.poisson_share, args)
            for kind in KINDS
            for count in args.compare
        ]
    return {
        "ratio": {k: rates[k, many]["ratio"] for k in KINDS},
        "failed": sum(row["failed"] for row in (*saturated, *arrivals)),
        "saturated": saturated,
        "poisson": arrivals,
        "set_up_seconds": set_up,
    }


def rounds(servers: dict[int, Server], kind: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Saturated rounds of all servers in turn; each one's medians and its ratio to the first.

    The ratio is of rounds that follow each other: the median over the rounds.
    """
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in servers}
    for turn in range(-1, max(args.repeat, args.point_repeat)):
        # The compared follow each other, now one first and now the other.
        compared = args.compare if turn % 2 else args.compare[::-1]
        points = args.points if turn < args.point_repeat else []
        for count in dict.fromkeys((*(compared if turn < args.repeat else ()), *points)):
            run = saturated_round(servers[count], kind, turn, args)
            if turn >= 0:  # the first warms up
                runs[count].append(run)
                report.log(f"{kind} {count}: {run['tokens_per_second']:.1f} tokens/s")
    few = [run["tokens_per_second"] for run in runs[args.compare[0]]]
    rows = []
    for count, own in runs.items():
        rates = [run["tokens_per_second"] for run in own]
        requests = len(own) * args.requests
        rows.append(
            {
                "popularity": kind,
                "adapters": count,
                "tokens_per_second": statistics.median(rates),
                "ratio": statistics.median(r / f for r, f in zip(rates, few, strict=False)),
                "rounds": rates,
                "first_token_ms": {
                    p: statistics.median(run["first_token_ms"][p] for run in own)
                    for p in own[0]["first_token_ms"]
                },
                "failed": sum(run["failed"] for run in own),
                **{f"{n}_per_request": sum(run[n] for run in own) / requests for n in COUNTERS},
            }
        )
    return rows


def saturated_round(
    server: Server, kind: str, turn: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One round; the same draws of prompts for every server, and of shares of the adapters."""
    wanted = requests(server.names, kind, args.requests, f"{kind} {turn}", args)
    before = server.counters()

    async def run() -> dict[str, Any]:
        async with AsyncClient(server.process.address, timeout=600.0) as client:
            await client.server_info()  # connects
            result = await saturate(client, wanted, args.clients)
        return {
            "tokens_per_second": result.rate(args.clients),
            "first_token_ms": result.first_token_ms,
            "failed": result.errors.total(),
        }

    result = asyncio.run(run())
    after = server.counters()
    return {**result, **{name: after[name] - before[name] for name in COUNTERS}}


def arriving(server: Server, kind: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Latencies under Poisson arrivals, ``rate`` requests a second."""
    due = poisson(rate, args.poisson_seconds, random.Random(kind))
    wanted = requests(server.names, kind, len(due), f"{kind} poisson", args)
    before = server.counters()

    async def run() -> dict[str, Any]:
        async with AsyncClient(server.process.address, timeout=600.0) as client:
            await client.server_info()
            return summary(await play(due, lambda i: streamed(client, wanted[i])))

    result = asyncio.run(run())
    after = server.counters()
    loads = (after["misses"] - before["misses"]) / max(1, len(due))
    report.log(f"{kind} {len(server.names)}, Poisson: first token {result['first_token_ms']}")
    return {
        "popularity": kind,
        "adapters": len(server.names),
        "rate": rate,
        "misses_per_request": loads,
        **result,
    }


def requests(
    names: Sequence[str], kind: str, count: int, seed: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Keyword arguments of ``count`` streams, drawn from a seed."""
    rng = random.Random(seed)
    adapters = rng.choices(names, popularity(kind, len(names)), k=count)
    return [
        {
            "token_ids": [rng.randrange(4, args.vocabulary) for _ in range(args.prompt)],
            "adapters": {name: 1.0},
            "max_tokens": args.tokens,
            "ignore_eos": True,
            "temperature": 0.0,
        }
        for name in adapters
    ]


if __name__ == "__main__":
    main()
