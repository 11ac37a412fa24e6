"""Replicas on Ray Serve, on this machine and the demo bundle: the figures of scaling out.

``serving``: two replicas and two gateways beside a single server. Answers that differ from its;
the gateway's share of the first token; a replica killed under load; an adapter registered and
removed through one gateway, as both serve it; many registered at once through both.

``affinity``: Zipf traffic over three times as many adapters as a replica has slots, over three
replicas, with our request router and with Ray's own. With two replicas a third of the adapters can
be nowhere, and the share of requests for those bounds every router: ``--replicas 2`` shows it.

``throughput``: tokens a second of two replicas of one thread beside a single server of one thread,
on a Llama of 100M parameters in NF4, STREAMS streams for each engine, by turns. The replicas share
two cores with the gateway, with Ray's processes and with this client.

All processes of a run are on loopback, in two Ray nodes, on the cores that there are: the first
token's overhead is of an idle cluster, one request at a time.

    python -m benchmarks.cluster serving --json
    python -m benchmarks.cluster throughput --json
    python -m benchmarks.cluster affinity --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.local_cluster import LocalCluster
from benchmarks.many_adapters import ATTENTION, Template, names, register
from benchmarks.served import Served, ask_all
from benchmarks.workload import Workload
from mora_serve.client import Client
from mora_serve.config import AdaptersConfig
from mora_serve.core import EngineStats
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess
from mora_serve.errors import MoraError, NotFound
from mora_serve.model.loading import read_base

ROUNDS = 100  # first tokens, on either side by turns
KILLED_REQUESTS, KILLED_TOKENS, CALLERS = 160, 150, 12
REGISTERED = 5
TOGETHER, REGISTRARS = 200, 16  # adapters, and callers that register them
STREAMS, ANSWERS, TURNS = 16, 128, 5  # streams for each engine, tokens of each, of either side
SLOTS, ZIPF, REQUESTS, WARM, TOKENS = 8, 0.8, 1500, 500, 8
PATIENCE = 60.0  # seconds
SEEN = 3.0  # seconds after which a change is to be known everywhere


def main() -> None:
    """Measure one part and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("serving", "affinity", "throughput"))
    parser.add_argument("--replicas", type=int, default=3, help="of affinity (3)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    parts = {
        "serving": serving,
        "affinity": lambda: affinity(args.replicas),
        "throughput": throughput,
    }
    report.emit({**parts[args.part](), "environment": report.environment()})


def serving() -> dict[str, Any]:
    """Beside a single server, with a replica killed, with adapters that come and go."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = Path(folder) / "adapters"
        shutil.copytree(bundle_path() / "adapters", adapters)
        template = Template(read_base("demo").shape, 4, ATTENTION)
        for i in range(TOGETHER):
            template.write(adapters / f"t{i}", i)
        flags = {
            "server.state": str(Path(folder) / "state"),
            "adapters.root": str(adapters),
            "cluster.replicas": 2,
            "cluster.gateways": 2,
        }
        with (
            LocalCluster(flags) as cluster,
            ServerProcess({"engine.threads": 1, "server.log_calls": False}) as process,
            Client(process.address, timeout=PATIENCE) as single,
            Client(cluster.address, timeout=PATIENCE) as many,
            Client(cluster.addresses[1], timeout=PATIENCE) as other,
        ):
            process.wait_until_ready(single)
            result = {**compared(single, many), **overhead(single, many)}
            process.stop()
            return {
                **result,
                **registered(many, other),
                **together(many, other),
                **killed(cluster, many),
            }


def compared(single: Client, many: Client) -> dict[str, Any]:
    """Answers of the cluster that are not those of a single server, tokens and decisions."""
    different = count = 0
    for example in read_examples(bundle_path()):
        for heat in (0.0, 0.8):
            one, two = (
                client.generate(example.prompt, max_tokens=24, temperature=heat, seed=7)
                for client in (single, many)
            )
            count += 1
            different += (one.tokens, one.text, one.decision) != (
                two.tokens,
                two.text,
                two.decision,
            )
    return {"answers": count, "answers_different": different}


def overhead(single: Client, many: Client) -> dict[str, Any]:
    """Milliseconds to the first token, of either, one request at a time."""
    times: dict[str, list[float]] = {"single": [], "cluster": []}
    for i in range(ROUNDS + 10):
        for name, client in (("single", single), ("cluster", many)):
            start = time.perf_counter()
            prompt = f"write the word number {i} backwards"
            with client.stream(prompt, max_tokens=4, ignore_eos=True) as stream:
                next(iter(stream))
                seconds = time.perf_counter() - start
                list(stream)
            if i >= 10:
                times[name].append(1000 * seconds)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "first_token_ms": middle,
        "gateway_overhead_ms": middle["cluster"] - middle["single"],
    }


def registered(one: Client, other: Client) -> dict[str, Any]:
    """Seconds from a change through one gateway until both serve by it; the longest."""

    def served() -> list[bool]:
        return [_serves(client, "fresh") for client in (one, other)]

    added, removed = [], []
    for _ in range(REGISTERED):
        one.register_adapter("fresh", "reverse")
        added.append(_until(lambda: all(served())))
        one.unregister_adapter("fresh")
        removed.append(_until(lambda: not any(served())))
    return {"registered_seconds": max(added), "removed_seconds": max(removed)}


def together(one: Client, other: Client) -> dict[str, Any]:
    """Register many at once through two gateways; how many of them either does not have."""
    clients = (one, other)

    def add(i: int) -> str:
        return clients[i % 2].register_adapter(f"t{i}", f"t{i}").digest

    start = time.monotonic()
    with ThreadPoolExecutor(REGISTRARS) as registrars:
        digests = dict(enumerate(registrars.map(add, range(TOGETHER))))
    seconds = time.monotonic() - start

    def missing() -> int:
        found = [{a.name: a.digest for a in client.list_adapters()} for client in clients]
        return sum(f.get(f"t{i}") != digest for f in found for i, digest in digests.items())

    with contextlib.suppress(TimeoutError):
        _until(lambda: not missing(), SEEN)
    lost = missing()
    unserved = sum(not _serves(clients[1 - i % 2], f"t{i}") for i in range(0, TOGETHER, 5))
    return {
        "together": TOGETHER,
        "together_lost": lost,
        "together_unserved": unserved,
        "together_seconds": seconds,
    }


def killed(cluster: LocalCluster, client: Client) -> dict[str, Any]:
    """Kill a replica while CALLERS ask; what became of the answers, and of the capacity."""

    def ask(i: int) -> str:
        try:
            answer = client.generate(
                f"tell me about number {i}", max_tokens=KILLED_TOKENS, ignore_eos=True, seed=i
            )
        except MoraError as e:
            return "retryable" if e.retry_after is not None else f"lost: {e.code} {e.reason}"
        return "whole" if len(answer.tokens) == KILLED_TOKENS else "lost: short"

    with ThreadPoolExecutor(CALLERS) as callers:
        asked = [callers.submit(ask, i) for i in range(KILLED_REQUESTS)]
        _until(lambda: sum(a.done() for a in asked) >= CALLERS)
        cluster.kill_replicas()
        outcomes = [a.result() for a in asked]
    whole = outcomes.count("whole")
    return {
        "killed_whole": whole,
        "killed_retryable": outcomes.count("retryable"),
        "killed_lost": len(outcomes) - whole - outcomes.count("retryable"),
        "capacity_seconds": cluster.wait_for(2, 2 * PATIENCE),
    }


def affinity(replicas: int) -> dict[str, Any]:
    """Hit rate and balance with our request router and with Ray's."""
    ours, theirs = (zipf(replicas, ours=ours) for ours in (True, False))
    return {
        "hit_rate": ours["hit_rate"],
        "hit_rate_default": theirs["hit_rate"],
        "hit_rate_ratio": ours["hit_rate"] / theirs["hit_rate"],
        "load_ratio": ours["load_ratio"],
        "affinity": ours,
        "default": theirs,
    }


def zipf(replicas: int, *, ours: bool) -> dict[str, Any]:
    """Zipf traffic over 3 * SLOTS adapters."""
    base = read_base("demo")
    limits = AdaptersConfig(slots=SLOTS)
    count = 3 * SLOTS
    rng = random.Random(1)
    weights = [(i + 1) ** -ZIPF for i in range(count)]
    drawn = rng.choices(list(names(count)), weights, k=WARM + REQUESTS)
    with tempfile.TemporaryDirectory() as state:
        register(Path(state), base.shape, count, limits)
        flags = {
            "server.state": state,
            "adapters.slots": SLOTS,
            "cluster.replicas": replicas,
            "cluster.affinity": ours,
        }
        with (
            LocalCluster(flags) as cluster,
            Client(cluster.address, timeout=PATIENCE) as client,
            ThreadPoolExecutor(CALLERS) as callers,
        ):

            def ask(name: str) -> None:
                client.generate("x", adapters={name: 1.0}, max_tokens=TOKENS, ignore_eos=True)

            list(callers.map(ask, drawn[:WARM]))
            before = _settled(cluster)
            start = time.perf_counter()
            list(callers.map(ask, drawn[WARM:]))
            seconds = time.perf_counter() - start
            after = _settled(cluster)
    hits, misses = (
        sum(getattr(r, key) for r in after) - sum(getattr(r, key) for r in before)
        for key in ("slot_hits", "slot_misses")
    )
    tokens = [a.generation_tokens - b.generation_tokens for a, b in _pairs(before, after)]
    return {
        "hit_rate": hits / (hits + misses),
        "load_ratio": max(tokens) * len(tokens) / sum(tokens),
        "requests": REQUESTS,
        "requests_a_second": REQUESTS / seconds,
        "zipf": ZIPF,
        "adapters": count,
        "slots": SLOTS,
        "replicas": replicas,
    }


def throughput() -> dict[str, Any]:
    """Tokens a second of two replicas and of a single server."""
    workload = Workload()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        workload.write_base(root / "base")
        engine = {"engine.threads": 1, "engine.prefix_cache": False, "server.log_calls": False}
        flags = {
            **engine,
            "base.model": str(root / "base"),
            "server.state": str(root / "state"),
            "engine.kv_bytes": 256 << 20,
            "cluster.replicas": 2,
        }
        with LocalCluster(flags) as cluster, Served(root, (), engine) as single:
            sides = {"single": (single.address, STREAMS), "cluster": (cluster.address, 2 * STREAMS)}
            rates: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(TURNS + 1):  # the first warms up
                for name, (address, streams) in sides.items():
                    prompts = workload.prompts(streams, turn)
                    run = asyncio.run(ask_all(address, prompts, [{}] * streams, ANSWERS))
                    if turn:
                        rates[name].append(run.rate())
                        report.log(f"{name}: {rates[name][-1]:.0f} tokens/s")
    ratios = [two / one for one, two in zip(rates["single"], rates["cluster"], strict=True)]
    return {"throughput_ratio": statistics.median(ratios), "tokens_a_second": rates}


def _settled(cluster: LocalCluster) -> list[EngineStats]:
    time.sleep(1)  # a report is a moment old
    return cluster.reports()


def _pairs(
    before: Sequence[EngineStats], after: Sequence[EngineStats]
) -> list[tuple[EngineStats, EngineStats]]:
    """Reports of the same replicas, which only count up: the order of both is that of the steps."""
    return [(a, b) for b, a in zip(before, after, strict=True)]


def _serves(client: Client, adapter: str) -> bool:
    try:
        return bool(client.generate("x", adapters={adapter: 1.0}, max_tokens=2).tokens)
    except NotFound:
        return False


def _until(holds: Callable[[], bool], seconds: float = PATIENCE) -> float:
    start = time.monotonic()
    while not holds():
        if time.monotonic() - start > seconds:
            raise TimeoutError("it does not come about")
        time.sleep(0.05)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
