"""Real servers and a real cluster for the simulator: what their work takes, and how they do.

One server, and replicas on Ray Serve behind their gateway (``benchmarks.local_cluster``), on the
demo's base, each engine with one thread and fewer slots than adapters, asked over gRPC. What a step
and a first token take is measured of either: of the cluster with all replicas at work, as they
share this machine's cores with the gateway, with Ray and with this client. What first tokens take
besides their steps, and what loads add, is that of other traffic of the same rate, on adapters that
stay in slots and on such that never are, under Ray's own routing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import metrics
from benchmarks.cluster_model import Cluster, zipf_trace
from benchmarks.local_cluster import LocalCluster
from benchmarks.many_adapters import ATTENTION, Template
from benchmarks.open_loop import Outcome, play, streamed
from benchmarks.replica_model import Job, Limits, Profile
from mora_serve.client import AsyncClient, Client
from mora_serve.cluster.policy import REPORT_SECONDS, Routing
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess, free_port
from mora_serve.model.shape import shape_from_config

ROWS = (1, 2, 4, 8)  # answers at a time, of each engine, whose steps are timed
SETTLED = 1.0  # seconds, after which the engines' counters are up to date
SHORT = 16  # tokens of a prompt
DRAWS = 15  # of what the model leaves to chance
PROBES = 32  # first tokens timed
ROUNDS = 2  # over these, to time their loads
SPARE = 48  # more adapters, whose first loads are timed
FEWEST = 8  # first tokens beside so many answers that tell how long they take


@dataclass(frozen=True)
class Work:
    """What is asked of the servers: tokens of a request, adapters, slots, traffic.

    ``utilisation`` is the share of what they could do one request at a time.
    """

    adapters: int
    slots: int
    prompt: int
    output: int
    rank: int
    exponent: float
    seconds: float
    seed: int
    utilisation: float = 0.25

    @property
    def limits(self) -> Limits:
        """The servers' settings, as the model takes them."""
        return Limits(slots=self.slots)


class Engines(Protocol):
    """What answers at an address: one engine or several."""

    @property
    def address(self) -> str:
        """HOST:PORT."""

    def counters(self) -> list[tuple[float, float, float]]:
        """Of each engine: adapters found in a slot, adapters loaded, tokens made."""


class Server:
    """``mora-serve serve``, in a process of its own."""

    def __init__(self, process: ServerProcess, metrics_port: int) -> None:
        self.address = process.address
        self._port = metrics_port

    def counters(self) -> list[tuple[float, float, float]]:
        """See ``Engines``."""
        found = metrics.totals(self._port)
        keys = ("adapter_slot_hits", "adapter_slot_misses", "generation_tokens")
        hits, misses, tokens = (found[f"mora_{key}_total"] for key in keys)
        return [(hits, misses, tokens)]


class Replicas:
    """A gateway and replicas on Ray Serve."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.address = cluster.address
        self._cluster = cluster

    def counters(self) -> list[tuple[float, float, float]]:
        """See ``Engines``; the replicas' order is the same each time."""
        reports = self._cluster.reports()
        return [(r.slot_hits, r.slot_misses, r.generation_tokens) for r in reports]


@contextlib.contextmanager
def running(root: Path, count: int, work: Work, routing: Routing) -> Iterator[Engines]:
    """Fresh engines with all adapters registered, none in a slot: a server, or a cluster of two."""
    flags = {
        "adapters.root": str(root),
        "adapters.slots": work.slots,
        "engine.threads": 1,
        "engine.prefix_cache": False,
        "server.log_calls": False,
    }
    with contextlib.ExitStack() as opened:
        made: Engines
        if count == 1:
            port = free_port()
            process = opened.enter_context(ServerProcess({**flags, "server.metrics_port": port}))
            made = Server(process, port)
        else:
            flags |= {
                "server.state": opened.enter_context(tempfile.TemporaryDirectory()),
                "cluster.replicas": count,
                "cluster.affinity": routing == "affinity",
            }
            made = Replicas(opened.enter_context(LocalCluster(flags)))
        client = opened.enter_context(Client(made.address, timeout=120.0))
        client.wait_until_ready(timeout=120.0)
        for i in range(work.adapters + SPARE):
            client.register_adapter(f"z{i}", f"z{i}")
        for i in range(20 * count):  # the first steps of a process are slow
            client.generate(token_ids=tokens(work.prompt, i), base=True, max_tokens=8)
        yield made


@contextlib.contextmanager
def adapters(work: Work) -> Iterator[Path]:
    """A directory of adapters for the demo's base."""
    config = json.loads((bundle_path() / "base" / "config.json").read_text())
    template = Template(shape_from_config(config), work.rank, ATTENTION)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(work.adapters + SPARE):
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


def calibrate(root: Path, work: Work, engines: int = 1) -> Profile:
    """The profile of a server, or of one of so many replicas while all are at work."""
    with running(root, engines, work, "power-of-two") as made:
        return asyncio.run(_calibrate(made.address, work, engines))


async def _calibrate(address: str, work: Work, engines: int) -> Profile:
    """What steps, first tokens and loads take, each of the engines as busy."""
    profile = Profile(step={}, prompt_token=0.0, beside={0: [0.0]}, load=0.0, first_load=0.0)
    async with AsyncClient(address, timeout=120.0) as client:
        probe = _Probe(client)
        for _ in range(2 * PROBES):  # loads adapter 0 everywhere, and is not timed
            await probe.first(0, work.prompt)
        lengths = (SHORT, work.prompt)
        pairs = [[await probe.first(0, length) for length in lengths] for _ in range(PROBES)]
        short, own = zip(*pairs, strict=True)
        more = statistics.median(own) - statistics.median(short)
        step = {n: await probe.step(n * engines, work.slots) for n in ROWS}
        profile = replace(
            profile, step=step, prompt_token=max(0.0, more) / max(1, work.prompt - SHORT)
        )
    calm = replace(work, adapters=work.slots, seed=work.seed + 1)  # all of them stay in slots
    trace = traffic(profile, calm, engines)
    outcomes = await _play(address, calm, trace)
    steps = modelled_first(profile, work, 0)
    profile = replace(profile, beside=waits(profile, work, engines, outcomes))
    still = statistics.median(o.first_token for o in outcomes)
    fresh = range(work.adapters, work.adapters + SPARE)
    # Of all in turn, none stays in its slot until it is asked for again.
    for field, wanted in (("first", fresh), ("again", [*fresh] * ROUNDS)):
        due = arrivals(profile, work, engines, len(wanted))
        trace = [replace(job, adapter=a) for job, a in zip(due, wanted, strict=True)]
        took = [o.first_token for o in await _play(address, work, trace)]
        load = max(0.0, statistics.median(took) - still)
        missed = tuple(sorted(max(0.0, t - steps - load) for t in took))
        if field == "first":
            profile = replace(profile, first_load=load, first_missed=missed)
        else:
            profile = replace(profile, load=load, missed=missed)
    return profile


def waits(
    profile: Profile, work: Work, engines: int, outcomes: Sequence[Outcome]
) -> dict[int, list[float]]:
    """What first tokens took besides their steps, by the answers that an engine had at work.

    By the mean of all engines, as this client saw them; too few of a number go to the next lower.
    """
    by_work: dict[int, list[float]] = {}
    for outcome in outcomes:
        at_work = sum(o.sent < outcome.sent < o.ended for o in outcomes)
        by_work.setdefault(round(at_work / engines), []).append(outcome.first_token)
    beside: dict[int, list[float]] = {}
    for n, took in sorted(by_work.items()):
        if len(took) >= FEWEST or not beside:
            steps = modelled_first(profile, work, n)
            beside[n] = sorted(max(0.0, t - steps) for t in took)
    return beside


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


# --- the same traffic, real and modelled --------------------------------------------------------


def traffic(profile: Profile, work: Work, servers: int) -> list[Job]:
    """Arrivals at a share of what the servers could do one request at a time."""
    return arrivals(
        profile, work, servers, max(1, int(rate(profile, work, servers) * work.seconds))
    )


def arrivals(profile: Profile, work: Work, servers: int, requests: int) -> list[Job]:
    """So many, at the same rate."""
    sizes = (work.adapters, work.exponent, work.prompt, work.output, work.seed)
    return zipf_trace(requests, rate(profile, work, servers), *sizes)


def rate(profile: Profile, work: Work, servers: int) -> float:
    """Requests a second."""
    alone = work.prompt * profile.prompt_token + profile.step[1] * work.output
    return work.utilisation * servers / alone


def modelled(
    profile: Profile, work: Work, servers: int, routing: Routing, trace: Sequence[Job]
) -> dict[str, Any]:
    """The figures that the model foretells, from empty slots: medians of DRAWS runs of it.

    They differ in what a real one does by chance: whose home is where, and how long a wait is.
    """
    report = REPORT_SECONDS if routing == "affinity" else 0.0
    drawn: list[dict[str, Any]] = []
    for seed in range(DRAWS):
        own = [Job(j.due, j.adapter, j.prompt, j.output) for j in trace]
        cluster = Cluster(servers, profile, work.limits, routing, seed, report)
        cluster.run(own)
        drawn.append(cluster.figures(own))
    return {key: statistics.median(d[key] for d in drawn) for key in drawn[0]}


def real(
    root: Path, work: Work, servers: int, routing: Routing, trace: Sequence[Job]
) -> dict[str, Any]:
    """The figures of fresh engines. RuntimeError where a request fails."""
    with running(root, servers, work, routing) as engines:
        time.sleep(SETTLED)
        before = engines.counters()
        outcomes = asyncio.run(_play(engines.address, work, trace))
        time.sleep(SETTLED)
        after = engines.counters()
    if failed := [o.error or "EMPTY" for o in outcomes if o.error or not o.messages]:
        raise RuntimeError(f"{len(failed)} requests failed, the first with {failed[0]}")
    each = np.array(after) - np.array(before)
    hits, loads, made = each.sum(0)
    firsts = np.array([o.first_token for o in outcomes]) * 1e3
    p50, p95 = np.percentile(firsts, (50, 95)).tolist()
    late = np.percentile([o.sent - o.due for o in outcomes], 95) * 1e3
    seconds = max(o.ended for o in outcomes)
    return {
        "hit_rate": float(hits / max(1.0, hits + loads)),
        "first_token_p50_ms": p50,
        "first_token_p95_ms": p95,
        "load": float(each[:, 2].max() / (made / servers)),
        "tokens_a_second": float(made / seconds),
        "sent_late_p95_ms": float(late),
        "requests": len(outcomes),
    }


async def _play(address: str, work: Work, trace: Sequence[Job]) -> Sequence[Outcome]:
    async with AsyncClient(address, timeout=120.0) as client:
        await client.server_info()  # connects

        def ask(i: int) -> AsyncIterator[int]:
            return streamed(client, options(trace[i].adapter, work.prompt, work.output, i))

        return await play([job.due for job in trace], ask)


def errors(told: dict[str, Any], seen: dict[str, Any]) -> dict[str, float]:
    """Relative errors of a prediction."""
    keys = ("hit_rate", "load", "tokens_a_second", "first_token_p50_ms", "first_token_p95_ms")
    return {key: abs(told[key] - seen[key]) / max(seen[key], 1e-9) for key in keys}
