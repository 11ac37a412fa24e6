"""500 clients stream, 30 % of them vanish or stop reading; the others' tokens, and what is freed.

A real server in a process of its own, each client on a connection of its own. The same requests
are made twice: first every client reads to its end, then a third of the vanishing ones cancels in
mid-stream, a third reads nothing after the beginning (its stream carries more bytes than the
connection takes in), and a third lives in other processes, which are killed. Counted are survivors
whose tokens are not those of the undisturbed run, and what the server holds in the end: pages,
slots, requests.

    python -m benchmarks.vanish --json
    python -m benchmarks.vanish --clients 100 --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpc import aio

from benchmarks import families, metrics, oracle, report
from mora_serve.client import AsyncClient, Client, connection
from mora_serve.client.asynchronous import AsyncStream
from mora_serve.client.connection import Stubs
from mora_serve.demo.process import ServerProcess, free_port
from mora_serve.errors import MoraError

SHARE = 0.3
KINDS = ("cancels", "reads nothing", "is killed")
ADAPTERS = ("a", "b", "c")
SHORT, LONG = 48, 400  # tokens of an answer: of those who stay, of those who go
CHILDREN = 2  # processes of those that are killed
SECONDS = 300.0  # that one run may take
STALL_SECONDS = 2.0
# A connection of its own, with the smallest window, so that what is not read stands still.
OPTIONS = (
    *connection.OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 16 << 10),
)
GIVEN_UP = "RESOURCE_EXHAUSTED"  # how a stream ends that nobody reads
CHECKS = "mora_engine_integrity_checks_total"
HELD = (
    *("mora_kv_cache_pages_used", "mora_adapter_slots_used"),
    *("mora_num_requests_running", "mora_num_requests_waiting"),
)


class Lone(AsyncClient):
    """A client on a connection of its own."""

    def __init__(self, address: str) -> None:
        Stubs.__init__(self, aio.insecure_channel(address, OPTIONS), address, "", SECONDS)


@dataclasses.dataclass(frozen=True)
class Job:
    """One client's request; ``kind`` is how it goes, empty for one that stays."""

    options: dict[str, Any]
    kind: str


def main() -> None:
    """Measure and report; ``--child`` is for the processes that are killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("ready", flush=True)
        asyncio.run(child(args.child, json.load(sys.stdin)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = families.make_base("llama3", root / "base", max_position_embeddings=1024)
        variants = {name: {"r": 8, "lora_alpha": 16} for name in ADAPTERS}
        oracle.make_adapters(copy.deepcopy(model), root / "adapters", variants)
        report.emit(measure(root, draw(args.clients, random.Random(args.seed))))


def draw(clients: int, rng: random.Random) -> list[Job]:
    """The clients' requests: half of them sampled, a third without an adapter."""
    going = rng.sample(range(clients), round(SHARE * clients))
    kinds = {client: KINDS[i % len(KINDS)] for i, client in enumerate(going)}
    jobs = []
    for client in range(clients):
        kind = kinds.get(client, "")
        mixture = dict.fromkeys(rng.sample(ADAPTERS, rng.choice((0, 1, 2))), 1.0)
        options: dict[str, Any] = {
            "token_ids": [rng.randrange(4, 260) for _ in range(rng.randint(8, 40))],
            "max_tokens": LONG if kind else SHORT,
            "ignore_eos": True,
            "temperature": rng.choice((0.0, 0.8)),
            "seed": rng.getrandbits(32),
            "request_id": f"c{client}",
            **({"adapters": mixture} if mixture else {"base": True}),
            **({"logprobs": 20} if kind else {}),
        }
        jobs.append(Job(options, kind))
    return jobs


def measure(root: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """Both runs on one server."""
    port = free_port()
    flags = {
        "base.model": root / "base",
        "base.quantization": "none",
        "base.dtype": "fp32",
        "base.device": "cpu",
        "adapters.root": root / "adapters",
        "adapters.slots": 4,
        "engine.stall_seconds": STALL_SECONDS,
        "server.metrics_port": port,
    }
    with ServerProcess(flags) as process, Client(process.address) as client:
        process.wait_until_ready(client)
        for name in ADAPTERS:
            client.register_adapter(name, name)
        started = time.monotonic()
        want, _ = asyncio.run(run(process.address, jobs, vanish=False))
        report.log(f"undisturbed: {time.monotonic() - started:.1f} s")
        free(port)
        before = metrics.ended(port, GIVEN_UP)
        started = time.monotonic()
        got, how = asyncio.run(run(process.address, jobs, vanish=True))
        ended = time.monotonic()
        report.log(f"disturbed: {ended - started:.1f} s; {how}")
        seconds = free(port)
        given_up = metrics.ended(port, GIVEN_UP) - before
        after = metrics.totals(port)
        # One request more, after which the engine is idle and looks at its books again.
        last = client.generate(**{**jobs[0].options, "max_tokens": SHORT})
        deadline = time.monotonic() + 30
        while (books := metrics.totals(port))[CHECKS] <= after[
            CHECKS
        ] and time.monotonic() < deadline:
            time.sleep(0.2)
    stay = [i for i, job in enumerate(jobs) if not job.kind]
    different = sum(got[i] != want[i] or len(want[i]) != SHORT for i in stay)
    return {
        "clients": len(jobs),
        "survivors": len(stay),
        "vanished": {kind: sum(job.kind == kind for job in jobs) for kind in KINDS},
        "in_mid_stream": how,
        "all_in_mid_stream": sum(how.values()),
        "different": different,
        "held": sum(after[name] for name in HELD),
        "seconds_until_free": seconds,
        "streams_given_up": given_up,
        "integrity_checks": books[CHECKS] - after[CHECKS],
        "integrity_violations": books["mora_engine_integrity_violations_total"],
        "answers_after": len(last.tokens) == SHORT,
        "environment": report.environment(),
    }


def free(port: int) -> float:
    """Seconds until the server holds nothing; they are limited."""
    started = time.monotonic()
    while time.monotonic() - started < 60:
        now = metrics.totals(port)
        if not any(now[name] for name in HELD):
            break
        time.sleep(0.1)
    return time.monotonic() - started


async def run(
    address: str, jobs: Sequence[Job], vanish: bool
) -> tuple[list[list[int]], dict[str, int]]:
    """All clients at once; their tokens, and how many of each kind went in mid-stream."""
    how: Counter[str] = Counter()
    over = asyncio.Event()
    async with asyncio.timeout(SECONDS), contextlib.AsyncExitStack() as stack:
        options = [job.options for job in jobs if job.kind == "is killed"]
        elsewhere = {"is killed"} if vanish else set()
        children = [await begin(stack, address) for _ in range(CHILDREN if vanish else 0)]
        for i, process in enumerate(children):
            await tell(process, options[i::CHILDREN])
        tasks = [
            asyncio.create_task(ask(address, job, vanish, how, over))
            if job.kind not in elsewhere
            else None
            for job in jobs
        ]
        how["is killed"] += sum(await asyncio.gather(*map(kill, children)))
        unread = [t for t, j in zip(tasks, jobs, strict=True) if j.kind == "reads nothing"]
        rest = [t for t in tasks if t is not None and not (vanish and t in unread)]
        await asyncio.gather(*rest)
        over.set()
        await asyncio.gather(*(t for t in tasks if t is not None))
        return [[] if t is None else t.result() for t in tasks], dict(how)


async def ask(
    address: str, job: Job, vanish: bool, how: Counter[str], over: asyncio.Event
) -> list[int]:
    """One client's tokens as far as it reads them."""
    tokens: list[int] = []
    async with Lone(address) as client:
        try:
            async with await client.stream(**job.options) as stream:
                if vanish and job.kind == "reads nothing":
                    await over.wait()
                    await asyncio.sleep(2 * STALL_SECONDS)
                    given_up = await is_given_up(stream)
                    how[job.kind] += given_up
                    return tokens
                async for delta in stream:
                    tokens += [t.id for t in delta.tokens]
                    if vanish and job.kind == "cancels":
                        how[job.kind] += len(tokens) < LONG
                        return tokens
        except MoraError as e:
            report.log(f"{job.options['request_id']}: {e.code}: {e.message}")
    return tokens


async def is_given_up(stream: AsyncStream) -> bool:
    """Whether the server has given up a stream, told by what is read of it in the end."""
    try:
        async for _ in stream:
            pass
    except MoraError as e:
        return e.reason == "STREAM_STALLED"
    return False


async def begin(stack: contextlib.AsyncExitStack, address: str) -> asyncio.subprocess.Process:
    """A process for some of the clients, ready; killed at the end of the context at the latest."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.vanish", "--child", address),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=report.ROOT,
    )

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    stack.callback(end)
    await heard(process)
    return process


async def heard(process: asyncio.subprocess.Process) -> str:
    """The next line of a process."""
    if process.stdout is None:
        raise RuntimeError("the process has no standard output")
    return (await process.stdout.readline()).decode().strip()


async def tell(process: asyncio.subprocess.Process, options: Sequence[dict[str, Any]]) -> None:
    """Let a process begin its streams."""
    if process.stdin is None:
        raise RuntimeError("the process has no standard input")
    process.stdin.write(json.dumps(list(options)).encode())
    process.stdin.close()


async def kill(process: asyncio.subprocess.Process) -> int:
    """Kill a process once all of its streams have begun; how many were in their middle then."""
    line = await heard(process)
    process.kill()
    await process.wait()
    return int(line or "0")


async def child(address: str, options: Sequence[dict[str, Any]]) -> None:
    """Streams until it is killed; once all have tokens it says how many have not ended."""
    begun: set[int] = set()
    ended: set[int] = set()
    said = False

    async def one(i: int) -> None:
        nonlocal said
        async with Lone(address) as client, await client.stream(**options[i]) as stream:
            async for _ in stream:
                begun.add(i)
                if not said and len(begun) == len(options):
                    said = True
                    print(len(options) - len(ended), flush=True)
        ended.add(i)

    await asyncio.gather(*(one(i) for i in range(len(options))))


if __name__ == "__main__":
    main()
