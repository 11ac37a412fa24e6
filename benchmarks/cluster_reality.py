"""Real servers for the simulator: what their work takes, and how they do behind the same routing.

Servers on the demo's base, each with one thread and fewer slots than adapters, asked over gRPC. Two
of them stand for a cluster: this client routes between them with the cluster's own policy, from the
residency that each reports every ``REPORT_SECONDS`` and from what it has sent itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import metrics
from benchmarks.cluster_model import Cluster, zipf_trace
from benchmarks.many_adapters import ATTENTION, Template
from benchmarks.open_loop import play, streamed
from benchmarks.replica_model import Job, Limits, Profile
from mora_serve.client import AsyncClient, Client
from mora_serve.cluster.policy import Fleet, Routing, choose
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess, free_port
from mora_serve.model.shape import shape_from_config

REPORT_SECONDS = 0.5
ROWS = (1, 2, 4, 8)  # answers at a time whose steps are timed
PROBES = 32  # first tokens timed beside so many answers


@dataclass(frozen=True)
class Work:
    """What is asked of the servers: tokens of a request, adapters, slots, traffic."""

    adapters: int
    slots: int
    prompt: int
    output: int
    rank: int
    exponent: float
    seconds: float
    seed: int

    @property
    def limits(self) -> Limits:
        """The servers' settings, as the model takes them."""
        return Limits(slots=self.slots)


class Servers:
    """Some fresh servers with all adapters registered; none is in a slot."""

    def __init__(self, root: Path, count: int, work: Work) -> None:
        self._metrics = [free_port() for _ in range(count)]
        self._work = work
        self._processes = [
            ServerProcess(
                {
                    "adapters.root": root,
                    "adapters.slots": work.slots,
                    "engine.threads": 1,
                    "engine.prefix_cache": False,
                    "server.metrics_port": port,
                    "server.log_calls": False,
                }
            )
            for port in self._metrics
        ]
        self.clients: list[AsyncClient] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[list[str]]:
        """Started, with adapters; the addresses."""
        with contextlib.ExitStack() as opened:
            for process in self._processes:
                opened.enter_context(process)
            for process in self._processes:
                client = opened.enter_context(Client(process.address, timeout=120.0))
                process.wait_until_ready(client)
                for i in range(self._work.adapters):
                    client.register_adapter(f"z{i}", f"z{i}")
                for i in range(10):  # the first steps of a process are slow
                    client.generate(token_ids=tokens(self._work.prompt, i), base=True, max_tokens=8)
            yield [process.address for process in self._processes]

    def slots(self) -> tuple[float, float]:
        """Adapters found in a slot and loaded so far, by all servers."""
        found = [metrics.totals(port) for port in self._metrics]
        return (
            sum(f["mora_adapter_slot_hits_total"] for f in found),
            sum(f["mora_adapter_slot_misses_total"] for f in found),
        )


@contextlib.contextmanager
def adapters(work: Work) -> Iterator[Path]:
    """A directory of adapters for the demo's base."""
    config = json.loads((bundle_path() / "base" / "config.json").read_text())
    template = Template(shape_from_config(config), work.rank, ATTENTION)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(work.adapters):
            template.write(Path(folder) / f"z{i}", i)
        yield Path(folder)


def tokens(count: int, seed: int) -> list[int]:
    """A random prompt."""
    rng = random.Random(seed)
    return [rng.randrange(4, 250) for _ in range(count)]


def options(adapter: int, prompt: int, output: int, seed: int) -> dict[str, Any]:
    """Keyword arguments of the client's ``stream``."""
    return {
        "token_ids": tokens(prompt, seed),
        "adapters": {f"z{adapter}": 1.0},
        "max_tokens": output,
        "ignore_eos": True,
        "temperature": 0.0,
    }


# --- what the work takes ------------------------------------------------------------------------


def calibrate(root: Path, work: Work) -> Profile:
    """The profile of one server, asked for nothing but what is timed."""
    servers = Servers(root, 1, work)
    with servers.running() as (address,):
        return asyncio.run(_calibrate(address, work))


async def _calibrate(address: str, work: Work) -> Profile:
    async with AsyncClient(address, timeout=120.0) as client:
        probe = _Probe(client)
        cold = [await probe.first(i, 16) for i in range(work.adapters)]
        rounds = [await probe.first(i, 16) for _ in range(2) for i in range(work.adapters)]
        warm = [await probe.first(0, 16) for _ in range(PROBES)][1:]
        long = [await probe.first(0, 16 + 128) for _ in range(PROBES)]
        own = [await probe.first(0, work.prompt) for _ in range(PROBES)]
        still = statistics.median(warm)
        step = {n: await probe.step(n, work.slots) for n in ROWS}
        profile = Profile(
            step=step,
            prompt_token=max(0.0, statistics.median(long) - still) / 128,
            beside={0: [0.0]},
            load=max(0.0, statistics.median(rounds) - still),
            first_load=max(0.0, statistics.median(cold) - still),
        )
        beside: dict[int, list[float]] = {}
        for n in (0, *ROWS):
            took = await probe.beside(n, work) if n else own
            steps = modelled_first(profile, work, n)
            beside[n] = sorted(max(0.0, t - steps) for t in took)
    return Profile(profile.step, profile.prompt_token, beside, profile.load, profile.first_load)


def modelled_first(profile: Profile, work: Work, running: int) -> float:
    """Median seconds that the model has to a first token beside so many answers."""
    firsts = []
    for phase in range(PROBES):
        cluster = Cluster(1, profile, work.limits, "random")
        cluster.replicas[0].warm(0)
        jobs = [Job(0.0, 0, 1, 400) for _ in range(running)]
        at = 50 * profile.step[1] * (1 + phase / PROBES)
        jobs.append(Job(at, 0, work.prompt, 1))
        cluster.run(jobs)
        firsts.append(jobs[-1].first_token - at)
    return statistics.median(firsts)


class _Probe:
    """Requests that are timed."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._seed = 0

    def _ask(self, adapter: int, prompt: int, output: int) -> AsyncIterator[int]:
        self._seed += 1
        return streamed(self._client, options(adapter, prompt, output, self._seed))

    async def first(self, adapter: int, prompt: int) -> float:
        """Seconds to the first token of one request."""
        (outcome,) = await play([0.0], lambda _: self._ask(adapter, prompt, 1))
        return outcome.first_token

    async def step(self, rows: int, slots: int, output: int = 400) -> float:
        """Seconds a token of so many streams on as many adapters as there are slots."""
        took = []
        for _ in range(5):
            outcomes = await play([0.0] * rows, lambda i: self._ask(i % slots, 8, output))
            took += [
                (o.messages[-1][0] - o.messages[0][0]) / (o.tokens - o.messages[0][1])
                for o in outcomes
            ]
        return statistics.median(took)

    async def beside(self, rows: int, work: Work) -> list[float]:
        """Seconds to first tokens of one request at a time, beside so many streams."""
        streams = [
            asyncio.create_task(_drain(self._ask(i % work.slots, 1, 400))) for i in range(rows)
        ]
        await asyncio.sleep(0.1)
        took: list[float] = []
        while len(took) < PROBES:
            for i, task in enumerate(streams):
                if task.done():
                    task.result()  # one that failed ends the measurement
                    streams[i] = asyncio.create_task(_drain(self._ask(i % work.slots, 1, 400)))
            took.append(await self.first(0, work.prompt))
            await asyncio.sleep(random.Random(len(took)).uniform(0.0, 0.02))
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        return took


async def _drain(messages: AsyncIterator[int]) -> None:
    async for _ in messages:
        pass


# --- the same traffic, real and modelled --------------------------------------------------------


def traffic(profile: Profile, work: Work, servers: int, utilisation: float) -> list[Job]:
    """Arrivals at a share of what the servers could do one request at a time."""
    alone = work.prompt * profile.prompt_token + profile.step[1] * work.output
    rate = utilisation * servers / alone
    requests = max(1, int(rate * work.seconds))
    sizes = (work.adapters, work.exponent, work.prompt, work.output, work.seed)
    return zipf_trace(requests, rate, *sizes)


def modelled(
    profile: Profile, work: Work, servers: int, routing: Routing, trace: Sequence[Job]
) -> dict[str, Any]:
    """The figures that the model foretells, from empty slots."""
    own = [Job(j.due, j.adapter, j.prompt, j.output) for j in trace]
    report = REPORT_SECONDS if routing == "affinity" else 0.0
    cluster = Cluster(servers, profile, work.limits, routing, work.seed, report)
    cluster.run(own)
    return cluster.figures(own)


def real(
    root: Path, work: Work, servers: int, routing: Routing, trace: Sequence[Job]
) -> dict[str, Any]:
    """The figures of fresh servers. RuntimeError where a request fails."""
    group = Servers(root, servers, work)
    with group.running() as addresses:
        before = group.slots()
        outcomes, served = asyncio.run(_play(addresses, work, routing, trace))
        after = group.slots()
    if failed := [o.error or "EMPTY" for o in outcomes if o.error or not o.messages]:
        raise RuntimeError(f"{len(failed)} requests failed, the first with {failed[0]}")
    hits, loads = after[0] - before[0], after[1] - before[1]
    firsts = np.array([o.first_token for o in outcomes]) * 1e3
    p50, p95 = np.percentile(firsts, (50, 95)).tolist()
    late = np.percentile([o.sent - o.due for o in outcomes], 95) * 1e3
    return {
        "hit_rate": hits / max(1.0, hits + loads),
        "first_token_p50_ms": p50,
        "first_token_p95_ms": p95,
        "load": max(served) / (sum(served) / len(served)),
        "sent_late_p95_ms": float(late),
        "requests": len(outcomes),
    }


async def _play(
    addresses: Sequence[str], work: Work, routing: Routing, trace: Sequence[Job]
) -> tuple[Sequence[Any], list[int]]:
    fleet: Fleet[int] = Fleet(range(len(addresses)))
    rng = random.Random(work.seed)
    served = [0] * len(addresses)
    async with contextlib.AsyncExitStack() as opened:
        clients = [
            await opened.enter_async_context(AsyncClient(a, timeout=120.0)) for a in addresses
        ]

        async def ask(i: int) -> AsyncIterator[int]:
            adapter = trace[i].adapter
            key = choose(fleet, (str(adapter),), rng, routing)
            fleet.sent(key)
            fleet.loaded(key, str(adapter))
            served[key] += 1
            try:
                wanted = options(adapter, work.prompt, work.output, i)
                async for count in streamed(clients[key], wanted):
                    yield count
            finally:
                fleet.ended(key)

        async def reports() -> None:
            while True:
                await asyncio.sleep(REPORT_SECONDS)
                for key, client in enumerate(clients):
                    found = await client.list_adapters()
                    resident = [a.name[1:] for a in found if a.resident and a.name[0] == "z"]
                    fleet.report(key, resident, fleet.load(key))

        for client in clients:
            await client.server_info()  # connects
        reporting = asyncio.create_task(reports()) if routing == "affinity" else None
        outcomes = await play([job.due for job in trace], ask)
        if reporting is not None:
            reporting.cancel()
        await asyncio.sleep(1.0)  # the servers' counters are up to date then
    return outcomes, served


def errors(told: dict[str, Any], seen: dict[str, Any]) -> dict[str, float]:
    """Relative errors of a prediction."""
    keys = ("hit_rate", "first_token_p50_ms", "first_token_p95_ms")
    return {key: abs(told[key] - seen[key]) / max(seen[key], 1e-9) for key in keys}
