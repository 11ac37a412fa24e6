"""Mixed traffic for twenty minutes: does anything grow, leak, or fail that should not?

The bundled models in a server process. All the time, workers generate, stream, route, name tasks,
mix adapters, register, replace, update, pin and unregister adapters, leave in the middle of a
stream, let deadlines pass, and send requests that are wrong. Each call has the ends that are right
for it; any other is counted. Resident memory is compared between the end of the warm-up and the
end; descriptors and threads, and pages, requests and adapters in the server's metrics, when all
workers have stopped.

    python -m benchmarks.soak --json
    python -m benchmarks.soak --minutes 2 --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from benchmarks import report
from benchmarks.open_loop import percentiles
from benchmarks.watch import Watch
from mora_serve.client import AsyncClient, Client
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.demo.process import ServerProcess, free_port
from mora_serve.errors import MoraError
from mora_serve.v1 import generation_pb2 as pb

TENANTS = ("default", "soak-a", "soak-b")
PATHS = ("reverse", "uppercase", "caesar", "double", "roman")
CHURNED = 6  # names whose adapters come and go, a tenant
FULL = "RESOURCE_EXHAUSTED"  # a refusal under load is right for any call
KV_BYTES = 16 << 20  # memory of pages is taken as they are first used: few are soon used up
IDLE_SECONDS = 60.0  # until nothing may be left of the calls
GAUGES = {
    "mora_num_requests_running": 0.0,
    "mora_num_requests_waiting": 0.0,
    "mora_kv_cache_pages_used": 0.0,
}


class Traffic:
    """Workers against one server, and what came of their calls."""

    def __init__(self, address: str, seed: int) -> None:
        self.calls: Counter[str] = Counter()
        self.unexpected: Counter[str] = Counter()
        self.ending = False
        self._clients = {
            tenant: AsyncClient(address, tenant=tenant, timeout=60.0) for tenant in TENANTS
        }
        self._rng = random.Random(seed)
        self._prompts = [e.prompt for e in read_examples(bundle_path()) if e.prompt]

    async def run(self, seconds: float, workers: int) -> None:
        """Call for so long, so many at a time."""
        kinds: list[tuple[Callable[[AsyncClient], Awaitable[str]], set[str]]] = [
            (self._generate, {"OK"}),
            (self._stream, {"OK"}),
            (self._route, {"OK"}),
            (self._tasks, {"OK"}),
            (self._leave, {"OK"}),
            (self._hurried, {"OK", "DEADLINE_EXCEEDED"}),
            (self._wrong, {"INVALID_ARGUMENT", "NOT_FOUND"}),
            # Another worker may have the name: removed, replaced by other content, or pinned.
            (self._churn, {"OK", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"}),
            (self._use, {"OK", "NOT_FOUND"}),
        ]

        async def work() -> None:
            while not self.ending:
                call, right = self._rng.choice(kinds)
                await self._count(call, right)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(workers):
                tasks.create_task(work())
            await asyncio.sleep(seconds)
            self.ending = True

    async def close(self) -> None:
        """Remove what the workers have registered, and close the connections."""
        for client in self._clients.values():
            for adapter in await client.list_adapters():
                if adapter.name.startswith("churn-"):
                    await client.unregister_adapter(adapter.name)
            await client.close()

    async def _count(self, call: Callable[[AsyncClient], Awaitable[str]], right: set[str]) -> None:
        client = self._rng.choice(list(self._clients.values()))
        name = call.__name__.strip("_")
        try:
            end = await call(client)
        except MoraError as e:
            end = e.code
        except Exception as e:  # of the client itself
            end = type(e).__name__
        self.calls[name] += 1
        if end not in right | {FULL}:
            self.unexpected[f"{name}: {end}"] += 1

    def _prompt(self) -> str:
        return f"{self._rng.randrange(1000)} {self._rng.choice(self._prompts)}"

    def _name(self) -> str:
        return f"churn-{self._rng.randrange(CHURNED)}"

    async def _generate(self, client: AsyncClient) -> str:
        await client.generate(self._prompt(), base=True, max_tokens=self._rng.randint(1, 48))
        return "OK"

    async def _stream(self, client: AsyncClient) -> str:
        tokens = self._rng.randint(1, 64)
        count = 0
        async with await client.stream(
            self._prompt(), base=True, max_tokens=tokens, ignore_eos=True
        ) as deltas:
            async for delta in deltas:
                count += len(delta.tokens)
        return "OK" if count == tokens else f"{count - tokens} tokens too many"

    async def _route(self, client: AsyncClient) -> str:
        await client.route(self._prompt())
        return "OK"

    async def _tasks(self, client: AsyncClient) -> str:
        await client.generate(
            self._prompt(), task="reverse", fallback_to_router=True, max_tokens=16
        )
        return "OK"

    async def _leave(self, client: AsyncClient) -> str:
        async with await client.stream(self._prompt(), max_tokens=200, ignore_eos=True) as deltas:
            async for _ in deltas:
                if self._rng.random() < 0.2:
                    break
        return "OK"

    async def _hurried(self, client: AsyncClient) -> str:
        timeout = self._rng.choice((0.001, 0.01, 0.05))
        await client.generate(self._prompt(), max_tokens=200, ignore_eos=True, timeout=timeout)
        return "OK"

    async def _wrong(self, client: AsyncClient) -> str:
        requests = (
            pb.GenerateRequest(),
            pb.GenerateRequest(prompt=pb.Prompt(text="x"), sampling=pb.SamplingParams(top_p=7)),
            pb.GenerateRequest(prompt=pb.Prompt(text="x" * 100_000)),
            pb.GenerateRequest(
                prompt=pb.Prompt(text="x"),
                selection=pb.Selection(task=pb.TaskHint(tasks=["no-such-task"])),
            ),
            pb.GenerateRequest(
                prompt=pb.Prompt(text="x"),
                selection=pb.Selection(
                    mixture=pb.Mixture(adapters=[pb.AdapterWeight(adapter="../etc")])
                ),
            ),
        )
        await client._run(client.generation.Generate, self._rng.choice(requests), {})
        return "OK"

    async def _churn(self, client: AsyncClient) -> str:
        name, what = self._name(), self._rng.random()
        if what < 0.6:
            replace = self._rng.random() < 0.7
            await client.register_adapter(
                name,
                self._rng.choice(PATHS),
                replace=replace,
                tasks=["churn"],
                prompts=["churn it"],
            )
        elif what < 0.8:
            await client.unregister_adapter(name)
        elif what < 0.9:
            await client.update_adapter(name, tasks=["churn"], prompts=[self._prompt()[:60]])
        else:
            await client.pin_adapter(name, True)
            await client.pin_adapter(name, False)
        return "OK"

    async def _use(self, client: AsyncClient) -> str:
        names = {self._name(): 1.0, self._name(): 0.5}
        await client.generate(self._prompt(), adapters=names, max_tokens=16)
        return "OK"


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
    seconds, metrics_port = 60 * args.minutes, free_port()
    flags = {
        "adapters.root": bundle_path() / "adapters",
        "server.metrics_port": metrics_port,
        "engine.kv_bytes": KV_BYTES,
    }
    with ServerProcess(flags) as process, Client(process.address) as client:
        process.wait_until_ready(client)
        adapters = gauges(metrics_port)["mora_adapters_registered"]
        with Watch(process.pid, process.address) as watch:
            traffic = asyncio.run(played(process.address, args, watch))
            left = settled(metrics_port, {**GAUGES, "mora_adapters_registered": adapters})
            end = watch.samples[-1].at
        answers = client.generate("reverse 'stone'").text
        status = process.stop()
    warm = args.warm_up * seconds
    over = max(10.0, 0.1 * seconds)
    result = {
        "minutes": args.minutes,
        "calls": sum(traffic.calls.values()),
        "calls_by_kind": dict(traffic.calls),
        "unexpected": sum(traffic.unexpected.values()),
        "what_unexpected": dict(traffic.unexpected.most_common(20)),
        "resident_growth": watch.resident(seconds - over, seconds)
        / watch.resident(warm, warm + over)
        - 1,
        "resident_mb_each_tenth": [
            round(watch.resident(t * seconds / 10, (t + 1) * seconds / 10) / 1e6, 1)
            for t in range(10)
        ],
        "descriptors_more": leaked(watch, "descriptors", warm, seconds, end),
        "threads_more": leaked(watch, "threads", warm, seconds, end),
        "left": left,
        "left_over": len(left),
        "health_ms": percentiles([ms / 1e3 for ms in watch.health_ms]),
        "unhealthy": watch.unhealthy,
        "answers_afterwards": answers,
        "exit_status": status,
        "server_cpu_seconds": watch.cpu_seconds,
    }
    report.log(f"{result['calls']} calls, memory {result['resident_growth']:+.2%}, left {left}")
    return result


async def played(address: str, args: argparse.Namespace, watch: Watch) -> Traffic:
    """The traffic, with a line of progress a minute."""
    traffic, start = Traffic(address, args.seed), time.monotonic()

    async def tell() -> None:
        while True:
            await asyncio.sleep(60)
            report.log(
                f"{(time.monotonic() - start) / 60:.0f} min: {sum(traffic.calls.values())} calls, "
                f"{watch.samples[-1].resident / 1e6:.0f} MB, unexpected {dict(traffic.unexpected)}"
            )

    telling = asyncio.create_task(tell())
    await traffic.run(60 * args.minutes, args.workers)
    telling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await telling
    await traffic.close()
    return traffic


def leaked(watch: Watch, what: str, warm: float, seconds: float, end: float) -> int:
    """How many more there are at rest at the end than there ever were in the first part."""
    early = max(getattr(s, what) for s in watch.samples if s.at <= max(warm, 5.0))
    late = min(getattr(s, what) for s in watch.samples if s.at >= min(seconds, end - 2.0))
    return max(0, int(late - early))


def gauges(port: int) -> dict[str, float]:
    """The server's metrics without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        name, _, value = line.rpartition(" ")
        if not line.startswith("#") and "{" not in name:
            found[name] = float(value)
    return found


def settled(port: int, wanted: Mapping[str, float]) -> dict[str, float]:
    """Wait until the metrics are as they have to be at rest; those that are not in time."""
    end = time.monotonic() + IDLE_SECONDS
    while True:
        found = gauges(port)
        left = {name: found[name] for name, value in wanted.items() if found[name] != value}
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.5)


if __name__ == "__main__":
    main()
