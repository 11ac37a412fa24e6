"""SIGTERM under load: how every call ends, when the process does, and with which status.

Each round starts a real server, lets clients stream, generate, route and register without pause,
and sends SIGTERM at a random moment. A fifth of the answers is too long to finish in the time to
stop; two clients do not read theirs. The clients do not repeat calls: what they get is what the
server, or its absence, answers. A call counts as right when its answer is whole or its status is
UNAVAILABLE. Of those under way at the signal, short ones have to end whole, and endless ones with
the server's reason, not grpc's word that the connection is gone.

    python -m benchmarks.sigterm --json
    python -m benchmarks.sigterm --rounds 3 --json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import itertools
import math
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from benchmarks import families, oracle, report
from benchmarks.rich_status import reason_of
from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess
from mora_serve.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)

ADAPTERS = ("a", "b")
GRACE = 5.0  # seconds: server.drain_seconds
CLIENTS = 32
LOAD_SECONDS = (0.5, 3.0)  # before the signal
SHORT, ENDLESS = (8, 64), 900  # tokens of an answer
AT_THE_DOOR = 2.0  # seconds: far less than what calls that are let in get to finish
DRAINING, REFUSED = "DRAINING", "refused at the door"
WAIT = 60.0  # at most, for a process to end


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512}
        model = families.make_base("llama3", root / "base", max_position_embeddings=1024, **sizes)
        variants = {name: {"r": 8, "lora_alpha": 16} for name in ADAPTERS}
        oracle.make_adapters(copy.deepcopy(model), root / "adapters", variants)
        rounds = []
        for i in range(args.rounds):
            rounds.append(play(root, args.clients, random.Random(f"{args.seed} {i}")))
            report.log(f"round {i}: {rounds[-1]}")
    ended: Counter[str] = Counter()
    for r in rounds:
        ended.update(r["ended"])
    across = dict(sum((Counter(r["across"]) for r in rounds), Counter()))
    right = ("whole", "UNAVAILABLE")
    report.emit(
        {
            "rounds": len(rounds),
            "clients": args.clients,
            "grace_seconds": GRACE,
            "under_way_at_the_signal": sum(r["under_way"] for r in rounds),
            "these_ended": across,
            **judged(across),
            "all_ended": dict(ended),
            "wrong": sum(n for how, n in ended.items() if how not in right),
            "unread": dict(sum((Counter(r["unread"]) for r in rounds), Counter())),
            "statuses": [r["status"] for r in rounds],
            "wrong_statuses": sum(r["status"] != 0 for r in rounds),
            "seconds_to_exit": [r["seconds"] for r in rounds],
            "most_seconds_over": max(r["seconds"] - GRACE for r in rounds),
            "environment": report.environment(),
        }
    )


def judged(across: Mapping[str, int]) -> dict[str, int]:
    """Those under way at the signal: short ones that ended whole, or not; endless ones told why.

    A short one that came to the server after the signal is refused at the door.
    """
    found = dict.fromkeys(
        ("short_whole", "short_refused", "short_cut", "endless_told", "endless_not_told"), 0
    )
    for what, count in across.items():
        kind, _, how = what.partition(": ")
        if kind.startswith("short"):
            ends = {"whole": "short_whole", REFUSED: "short_refused"}
            found[ends.get(how, "short_cut")] += count
        elif how != "whole":
            told = how in (DRAINING, REFUSED)
            found["endless_told" if told else "endless_not_told"] += count
    return found


def play(root: Path, clients: int, rng: random.Random) -> dict[str, Any]:
    """One round."""
    flags = {
        "base.model": root / "base",
        "base.quantization": "none",
        "base.device": "cpu",
        "adapters.root": root / "adapters",
        "server.drain_seconds": GRACE,
    }
    with ServerProcess(flags) as process:
        with Client(process.address) as client:
            process.wait_until_ready(client)
            for name in ADAPTERS:
                client.register_adapter(name, name, prompts=[f"please {name} this"])
        found = asyncio.run(load(process, clients, rng))
        found["status"] = process.stop(grace=WAIT)
        return found


class Calls:
    """What calls came to: those that began before the signal, or after it."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.across: Counter[str] = Counter()  # of those, under way at the signal: kind and end
        self.unread: Counter[str] = Counter()
        self.open = 0
        self.signalled = math.inf

    @contextlib.contextmanager
    def one(self, kind: str) -> Iterator[Call]:
        """A call's time; what its block raises is how it ended."""
        self.open += 1
        call = Call(kind)
        began = time.monotonic()
        how = reason = ""
        try:
            yield call
            how = "whole"
        except aio.AioRpcError as e:
            how, reason = e.code().name, reason_of(e)
            if e.code() is not grpc.StatusCode.UNAVAILABLE:
                times = (f"{t - self.signalled:.2f}" for t in (began, time.monotonic()))
                report.log(f"{kind}, {' to '.join(times)} s after the signal: {e}")
        except CutShort:
            how = "cut short"
        finally:
            self.open -= 1
            if how:
                now = time.monotonic()
                self.ended[how] += 1
                if began < self.signalled <= now:
                    early = now - self.signalled < AT_THE_DOOR and not call.begun
                    if reason == DRAINING and early:
                        how = REFUSED
                    elif reason:
                        how = reason
                    length = "endless" if call.endless else "short"
                    self.across[f"{length} {kind}: {how}"] += 1


@dataclass
class Call:
    """One call: whether its answer is too long to finish, and whether it has begun."""

    kind: str
    endless: bool = False
    begun: bool = False


class CutShort(Exception):
    """An answer that ended well, but without all of its tokens."""


async def load(process: ServerProcess, clients: int, rng: random.Random) -> dict[str, Any]:
    """Clients ask until the process has ended."""
    calls, over = Calls(), asyncio.Event()
    async with aio.insecure_channel(process.address) as channel:
        tasks = [
            asyncio.create_task(client(channel, i, random.Random(rng.random()), calls, over))
            for i in range(clients)
        ]
        unread = [asyncio.create_task(leave_unread(process.address, calls, over)) for _ in range(2)]
        await asyncio.sleep(rng.uniform(*LOAD_SECONDS))
        under_way = calls.open
        calls.signalled = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        seconds = await exited(process, calls.signalled)
        over.set()
        async with asyncio.timeout(WAIT):
            await asyncio.gather(*tasks, *unread)
    return {
        "under_way": under_way,
        "seconds": round(seconds, 2),
        "ended": dict(calls.ended),
        "across": {how: n for how, n in calls.across.items() if n},
        "unread": dict(calls.unread),
    }


async def exited(process: ServerProcess, since: float) -> float:
    """Seconds from then until the process has ended."""
    while process.running and time.monotonic() - since < WAIT:
        await asyncio.sleep(0.02)
    return time.monotonic() - since


async def client(
    channel: aio.Channel, number: int, rng: random.Random, calls: Calls, over: asyncio.Event
) -> None:
    """Calls of every kind, one after another."""
    kinds = (stream, generate, route, register)
    for i in itertools.count():
        if over.is_set():
            return
        kind = kinds[(number + i) % len(kinds)] if number % 4 == 0 else rng.choice(kinds[:2])
        with calls.one(kind.__name__) as call:
            await kind(channel, rng, f"{number}-{i}", call)
        if calls.ended["UNAVAILABLE"]:  # one that is told so goes elsewhere, and comes back later
            await asyncio.sleep(rng.uniform(0.02, 0.2))


def request(kind: Any, rng: random.Random, call: Call) -> Any:
    """A request for so many tokens."""
    call.endless = rng.random() < 0.2
    tokens = ENDLESS if call.endless else rng.randint(*SHORT)
    name = rng.choice((*ADAPTERS, ""))
    weight = [generation_pb2.AdapterWeight(adapter=name, weight=1.0)] if name else []
    return kind(
        prompt=generation_pb2.Prompt(text=f"please {rng.random()}"),
        selection=generation_pb2.Selection(mixture=generation_pb2.Mixture(adapters=weight)),
        sampling=generation_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True),
    )


async def stream(channel: aio.Channel, rng: random.Random, name: str, call: Call) -> None:
    """A stream, read to its end."""
    message = request(generation_pb2.GenerateStreamRequest, rng, call)
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    tokens, finished = 0, False
    async for part in stub.GenerateStream(message, timeout=WAIT):
        call.begun = True
        tokens += len(part.delta.tokens)
        finished = part.WhichOneof("event") == "finished"
    if not finished or tokens != message.sampling.max_tokens:
        raise CutShort


async def generate(channel: aio.Channel, rng: random.Random, name: str, call: Call) -> None:
    """A whole answer."""
    message = request(generation_pb2.GenerateRequest, rng, call)
    stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
    answer = await stub.Generate(message, timeout=WAIT)
    if len(answer.tokens) != message.sampling.max_tokens:
        raise CutShort


async def route(channel: aio.Channel, rng: random.Random, name: str, call: Call) -> None:
    """A decision."""
    stub: Any = router_pb2_grpc.RouterServiceStub(channel)  # type: ignore[no-untyped-call]
    prompt = generation_pb2.Prompt(text=f"please {name}")
    await stub.Route(router_pb2.RouteRequest(prompt=prompt), timeout=WAIT)


async def register(channel: aio.Channel, rng: random.Random, name: str, call: Call) -> None:
    """A registration under a new name."""
    stub: Any = adapters_pb2_grpc.AdapterServiceStub(channel)  # type: ignore[no-untyped-call]
    message = adapters_pb2.RegisterAdapterRequest(name=f"new-{name}", path=rng.choice(ADAPTERS))
    await stub.RegisterAdapter(message, timeout=WAIT)


async def leave_unread(address: str, calls: Calls, over: asyncio.Event) -> None:
    """A stream of which nothing is read before the process has ended, on its own connection."""
    options: Sequence[tuple[str, int]] = (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 16 << 10),
    )
    async with aio.insecure_channel(address, options) as channel:
        message = generation_pb2.GenerateStreamRequest(
            prompt=generation_pb2.Prompt(text="hello"),
            selection=generation_pb2.Selection(base=generation_pb2.BaseOnly()),
            sampling=generation_pb2.SamplingParams(
                max_tokens=ENDLESS, ignore_eos=True, logprobs=20
            ),
        )
        stub: Any = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.GenerateStream(message, timeout=2 * WAIT)
        try:
            await call.read()
            await over.wait()
            while await call.read() is not aio.EOF:  # type: ignore[attr-defined]  # missing stub
                pass
            calls.unread[(await call.code()).name] += 1
        except aio.AioRpcError as e:
            calls.unread[e.code().name] += 1


if __name__ == "__main__":
    main()
