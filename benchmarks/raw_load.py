"""A load generator in a process of its own that takes little processor time: raw gRPC, no client.

What it sends is made beforehand and sent as bytes, and answers are not parsed, so that on shared
cores the server keeps most of them. Nothing is asked again. A flow is either open (each request is
sent when it is due) or closed (so many callers, each asking again as soon as it has its answer).

    answers, cpu_seconds = run(address, [Flow(...), Flow(...)])
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grpc import aio

from benchmarks.keys import bearer
from benchmarks.report import ROOT
from benchmarks.rich_status import DETAILS, reason_in

GENERATE, STREAM, ROUTE = (
    "/mora_serve.v1.GenerationService/Generate",
    "/mora_serve.v1.GenerationService/GenerateStream",
    "/mora_serve.v1.RouterService/Route",
)
PUSHBACK = "grpc-retry-pushback-ms"


@dataclass(frozen=True)
class Flow:
    """Calls of one tenant: ``payloads`` in turn, as serialised messages in base64.

    The tenant is that of the ``key``, or, on a server without keys, the one that is named.
    ``due`` are the times at which requests are sent, in seconds; without them ``callers`` ask one
    after another for ``seconds``. ``deadline`` is what each call is given, 0 for none. At
    ``until``, unless 0, the caller leaves all calls that have not ended.
    """

    name: str
    payloads: tuple[str, ...]
    method: str = GENERATE
    tenant: str = ""
    key: str = ""
    due: tuple[float, ...] = ()
    callers: int = 0
    seconds: float = 0.0
    deadline: float = 0.0
    until: float = 0.0


@dataclass(frozen=True)
class Answer:
    """One call: times in seconds since the start of the load.

    ``first`` is when the first message after the decision came, of a stream. ``reason`` and
    ``pushback`` are what a refusal carries, empty where it carries none.
    """

    due: float
    sent: float
    first: float
    ended: float
    code: str
    reason: str = ""
    pushback: str = ""


def payload(message: Any) -> str:
    """A message as a flow has it."""
    return base64.b64encode(message.SerializeToString()).decode()


def run(
    address: str, flows: Sequence[Flow], timeout: float = 900.0
) -> tuple[dict[str, list[Answer]], float]:
    """Play the flows in a process of their own: answers by flow, and its processor seconds."""
    spec = json.dumps({"address": address, "flows": [asdict(flow) for flow in flows]})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.raw_load"],
        input=spec,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    answers = {
        name: [
            Answer(due, sent, first, ended, code, reason_in(base64.b64decode(details)), pushback)
            for due, sent, first, ended, code, details, pushback in rows
        ]
        for name, rows in result["answers"].items()
    }
    return answers, result["cpu_seconds"]


def untyped(answers: Iterable[Answer]) -> list[str]:
    """Refusals that are not as they should be: what they are.

    A refusal is RESOURCE_EXHAUSTED with a reason and a pushback. A deadline that has passed and
    a caller who left are no refusals.
    """
    return [
        f"{a.code} {a.reason or 'without a reason'}, pushback {a.pushback or 'missing'}"
        for a in answers
        if a.code not in ("OK", "DEADLINE_EXCEEDED", "CANCELLED")
        and (a.code != "RESOURCE_EXHAUSTED" or not a.reason or not a.pushback)
    ]


def counts(answers: Iterable[Answer]) -> dict[str, int]:
    """How the calls ended: by code, refusals by reason."""
    return dict(Counter(a.reason or a.code for a in answers).most_common())


def steady(answers: Iterable[Answer], start: float, end: float, deadline: float = 0.0) -> float:
    """Whole answers a second that came between ``start`` and ``end``, those in time only."""
    good = sum(
        a.code == "OK" and start < a.ended <= end and (not deadline or a.ended - a.due <= deadline)
        for a in answers
    )
    return good / (end - start)


def saturated(answers: Sequence[Answer], callers: int, seconds: float) -> float:
    """Whole answers a second of a closed flow, from when each of its callers may have had one.

    Raises RuntimeError where the flow was too short for that, or a call failed.
    """
    ended = sorted(a.ended for a in answers)
    if {a.code for a in answers} != {"OK"} or len(ended) < 2 * callers:
        raise RuntimeError(f"{counts(answers)} are not enough to know the capacity; give it longer")
    return steady(answers, ended[callers - 1], seconds)


async def play(spec: Mapping[str, Any]) -> dict[str, Any]:
    """All flows at once; rows as ``run`` reads them."""
    options = (("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1))
    rows: dict[str, list[list[Any]]] = {}
    async with aio.insecure_channel(spec["address"], options) as channel:
        await channel.channel_ready()
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for one in spec["flows"]:
                rows[one["name"]] = []
                tasks.create_task(_flow(channel, Flow(**one), rows[one["name"]], start, tasks))
    return {"answers": rows, "cpu_seconds": time.process_time()}


async def _flow(
    channel: aio.Channel, flow: Flow, rows: list[list[Any]], start: float, tasks: asyncio.TaskGroup
) -> None:
    streams = flow.method == STREAM
    make: Any = channel.unary_stream if streams else channel.unary_unary
    call = make(flow.method, request_serializer=None, response_deserializer=None)
    metadata = [("mora-tenant", flow.tenant)] if flow.tenant else []
    metadata += bearer(flow.key) if flow.key else ()
    payloads = itertools.cycle([base64.b64decode(text) for text in flow.payloads])

    async def ask(due: float) -> None:
        sent = time.perf_counter() - start
        timeout = max(1e-3, flow.deadline - (sent - due)) if flow.deadline else None
        first, code, details, pushback = 0.0, "OK", "", ""
        asked = call(next(payloads), timeout=timeout, metadata=tuple(metadata))
        if flow.until:
            asyncio.get_running_loop().call_later(flow.until - sent, asked.cancel)
        try:
            if streams:
                messages = 0
                async for _ in asked:
                    messages += 1
                    if messages == 2:  # the first one tells the decision
                        first = time.perf_counter() - start
            else:
                await asked
        except aio.AioRpcError as e:
            code = e.code().name
            trailing: dict[str, Any] = dict(e.trailing_metadata() or ())  # type: ignore[arg-type]
            details = base64.b64encode(trailing.get(DETAILS, b"")).decode()
            pushback = str(trailing.get(PUSHBACK, ""))
        except asyncio.CancelledError:  # by call_later
            code = "CANCELLED"
        ended = time.perf_counter() - start
        rows.append([due, sent, first, ended, code, details, pushback])

    async def caller() -> None:
        while (now := time.perf_counter() - start) < flow.seconds:
            await ask(now)

    for _ in range(flow.callers):
        tasks.create_task(caller())
    for due in flow.due:
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
        tasks.create_task(ask(due))


def main() -> None:
    """Play what stdin says; the answers as JSON on stdout."""
    print(json.dumps(asyncio.run(play(json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
