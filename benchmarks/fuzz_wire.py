"""Mutated calls of every RPC over gRPC to a server in a process of its own.

Each call is made from its method's descriptor (``wire_cases``): plausible, wild or spoilt bytes,
metadata, deadlines and kinds. Whatever comes back has to be an answer of the method's type or a
documented, typed status that gives nothing away. Beside them, one connection for every 50 calls
speaks HTTP/2 as no client of grpc's would (``wire_garbage``). At the end the server has to answer
known prompts, of a tenant that no case names, with the same tokens as before.

    python -m benchmarks.fuzz_wire --json
    python -m benchmarks.fuzz_wire --requests 3000 --seconds 120 --json
    python -m benchmarks.fuzz_wire --only 1234            one case, told in full
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from benchmarks import report
from benchmarks.leaks import leaks
from benchmarks.wire_cases import NAMES, TENANT, Cases, WireCase
from benchmarks.wire_garbage import garbage, strike
from mora_serve import errors
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess, free_port

PATIENCE = 60.0  # a call that takes longer hangs
AT_ONCE = 32
GARBAGE_EVERY = 50
CHANNELS = 4
KEEPER = "keeper"  # the tenant that no case names
# What every one of these says has been written by hand; UNKNOWN and INTERNAL are nobody's.
DOCUMENTED = {e.code for e in errors.MoraError.__subclasses__()} - {"UNKNOWN", "INTERNAL"}
# grpc's own answers to what it does not let through.
_OWN = {
    "RESOURCE_EXHAUSTED": r".*[Mm]essage larger than max|received .*metadata size exceeds",
    "UNIMPLEMENTED": r"Method not found!$",
}


@dataclass(frozen=True)
class Outcome:
    """How a call ended: a status, and the messages that came before it."""

    code: str
    message: str = ""
    rich: bytes | None = None
    trailing: tuple[tuple[str, str | bytes], ...] = ()
    answers: tuple[bytes, ...] = ()


@dataclass
class Found:
    """What a run has seen."""

    requests: int = 0
    codes: collections.Counter[str] = field(default_factory=collections.Counter)
    methods: collections.Counter[str] = field(default_factory=collections.Counter)
    reasons: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: dict[int, list[str]] = field(default_factory=dict)
    connections: int = 0  # of garbage
    slowest: float = 0.0

    def add(
        self, number: int, case: WireCase, outcome: Outcome, seconds: float, what: list[str]
    ) -> None:
        """Count a case; ``what`` was wrong with it."""
        self.requests += 1
        self.methods[case.path if case.method else "none"] += 1
        self.codes[outcome.code] += 1
        self.reasons[reason_of(outcome)] += 1
        self.slowest = max(self.slowest, seconds)
        if what:
            self.wrong[number] = what
        if self.requests % 5000 == 0:
            report.log(f"{self.requests} requests, {len(self.wrong)} wrong")


def main() -> None:
    """Fuzz and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=1500.0, help="end by then, all told")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="make this case alone")
    args = parser.parse_args()
    numbers = range(args.requests) if args.only is None else range(args.only, args.only + 1)
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(Path(folder), numbers, args.seed, args.seconds, tell=args.only is not None)
    report.emit(result)


def fuzz(root: Path, numbers: range, seed: int, seconds: float, *, tell: bool) -> dict[str, Any]:
    """Start the server, make the calls, ask the known prompts before and after."""
    end = time.monotonic() + seconds
    adapters = root / "adapters"
    adapters.mkdir()
    for name in NAMES[:3]:
        shutil.copytree(bundle_path() / "adapters" / name, adapters / name)
    shutil.copytree(bundle_path() / "router", adapters / "router")
    (adapters / "link").symlink_to(adapters / "reverse")
    metrics = free_port()
    flags: dict[str, object] = {
        "adapters.root": adapters,
        "adapters.max_adapters": 40,
        "adapters.max_bytes": 1 << 20,
        "engine.max_tokens": 8,  # a mutated limit must not become work
        "router.feedback": "true",
        "router.feedback_bytes": 1 << 20,
        "server.state": root / "state",
        "server.max_message_bytes": 4 << 20,
        "server.metrics_port": metrics,
        "server.log_calls": "false",
    }
    cases = Cases(bundle_path(), seed, PATIENCE)
    secrets = [str(root), str(report.ROOT), sys.prefix, str(Path.home())]
    with ServerProcess(flags) as server, Client(server.address, tenant=KEEPER) as keeper:
        server.wait_until_ready(keeper)
        prepare(server.address, keeper, root)
        before = answers(keeper, root)
        started, own = time.monotonic(), time.process_time()
        found = run(server.address, cases, numbers, secrets, end, tell)
        took, own = time.monotonic() - started, time.process_time() - own
        running = wait_until_idle(metrics)
        untyped = untyped_calls(metrics)
        after = answers(keeper, root)
        cpu = cpu_seconds(server.pid)
        status = server.stop()
        faults = re.findall(r"Traceback.*?(?=\n\S)", server.whole_log, re.DOTALL)
    wrong = len(found.wrong) + untyped + running + len(faults) + (status != 0)
    for number, what in list(found.wrong.items())[:20]:
        report.log(f"case {number}: {cases.case(number).path}: {'; '.join(what)}")
    return {
        "requests": found.requests,
        "rpcs": len(found.methods),
        "garbage_connections": found.connections,
        "wrong": wrong,
        "what": {str(n): w for n, w in list(found.wrong.items())[:50]},
        "untyped_by_server": untyped,
        "left_running": running,
        "exit_status": status,
        "tracebacks_in_log": len(faults),
        "tracebacks": faults[:5],
        "same_answers": int(before == after),
        "codes": dict(found.codes.most_common()),
        "reasons": dict(found.reasons.most_common()),
        "slowest_seconds": round(found.slowest, 3),
        "seconds": round(took, 1),
        "server_cpu_seconds": round(cpu, 1),
        "client_cpu_seconds": round(own, 1),
        "seed": seed,
        "environment": report.environment(),
    }


def prepare(address: str, keeper: Client, root: Path) -> None:
    """Adapters for the keeper and for the tenant that the cases name."""
    keeper.upload_adapter("kept", root / "adapters" / "reverse")
    with Client(address, tenant=TENANT) as fuzzed:
        for name in NAMES[:3]:
            fuzzed.register_adapter(name, name)


def answers(keeper: Client, root: Path) -> list[Any]:
    """What known prompts give, greedily, and what the router of the bundle decides."""
    for file in sorted((root / "adapters" / "router").iterdir()):
        keeper.load_router(data=file.read_bytes())
    options: list[dict[str, Any]] = [
        {"prompt": "reverse 'stone'", "adapters": {"kept": 1.0}},
        {"prompt": "reverse 'stone'", "base": True},
        {"prompt": "reverse the word 'lamp'", "max_adapters": 1},
        {"messages": [("user", "reverse 'stone'")], "adapters": {"kept": 0.5}},
    ]
    given = [keeper.generate(max_tokens=8, temperature=0.0, **o) for o in options]
    return [(g.text, [t.id for t in g.tokens], g.decision.mixture) for g in given]


def run(
    address: str, cases: Cases, numbers: range, secrets: Sequence[str], end: float, tell: bool
) -> Found:
    """Make the calls of these numbers, many at once, until ``end``."""
    found, left, lock = Found(), iter(numbers), threading.Lock()

    def work(channel: grpc.Channel) -> None:
        while time.monotonic() < end:
            with lock:
                number = next(left, None)
            if number is None:
                return
            case = cases.case(number)
            start = time.monotonic()
            outcome = make(channel, case)
            took = time.monotonic() - start
            what = wrong(case, outcome, secrets)
            if struck := number % GARBAGE_EVERY == 0:
                rng = random.Random(f"{cases.seed}:connection:{number}")
                heard = strike(address, garbage(rng)).decode("latin-1")
                what += [f"connection: gives away {t}" for t in spoken(heard, secrets)]
            if tell:
                report.log(f"{case}\n{outcome}")
            with lock:
                found.add(number, case, outcome, took, what)
                found.connections += struck

    # Connections of their own, not one shared by channels of equal options.
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with contextlib.ExitStack() as open_, ThreadPoolExecutor(AT_ONCE) as threads:
        channels = [
            open_.enter_context(
                grpc.insecure_channel(
                    address, [*options, ("grpc.enable_retries", 0), ("mora.channel", i)]
                )
            )
            for i in range(CHANNELS)
        ]
        for done in [threads.submit(work, channels[i % CHANNELS]) for i in range(AT_ONCE)]:
            done.result()
    return found


def spoken(heard: str, secrets: Sequence[str]) -> list[str]:
    """What a connection gave away; in bytes that are no text, all may look like a path."""
    told = leaks(heard, b"", secrets)
    return [t for t in told if t.startswith(("traceback", "source", "exception", "secret"))]


def make(channel: grpc.Channel, case: WireCase) -> Outcome:
    """Make a call; how it ends."""
    kind = "_".join("stream" if s else "unary" for s in case.streams)
    method: Any = getattr(channel, kind)(case.path)
    sent: Any = iter(case.messages) if case.streams[0] else case.messages[0]
    options: dict[str, Any] = {
        "timeout": case.timeout,
        "metadata": case.metadata,
        "compression": grpc.Compression.Gzip if case.compressed else None,
    }
    received: list[bytes] = []
    try:
        if case.streams[1]:
            call = method(sent, **options)
            if case.reads == 0:
                call.cancel()
            for message in call:
                received.append(message)
                if len(received) == case.reads:
                    call.cancel()
        else:
            answer, call = method.with_call(sent, **options)
            received.append(answer)
    except grpc.RpcError as e:
        call = e
    pairs = tuple((m.key, m.value) for m in call.trailing_metadata() or ())
    rich = dict(pairs).get("grpc-status-details-bin")
    return Outcome(call.code().name, call.details() or "", rich, pairs, tuple(received))


def reason_of(outcome: Outcome) -> str:
    """The reason that the status gives; empty where it gives none."""
    info = _info(_status(outcome))
    return info.reason if info is not None else ""


def wrong(case: WireCase, outcome: Outcome, secrets: Sequence[str] = ()) -> list[str]:
    """What is not as it should be about how a call ended."""
    found = [f"gives away {leak}" for leak in leaks(_told(outcome), case.sent, secrets)]
    if case.method is not None and case.as_declared:
        kind = message_factory.GetMessageClass(case.method.output_type)
        for answer in outcome.answers:
            try:
                kind.FromString(answer)
            except DecodeError:
                found.append("an answer is no message of its type")
    if outcome.code == "OK":
        return found
    if outcome.code == "CANCELLED":
        return found if case.reads is not None else [*found, f"was cancelled: {outcome.message}"]
    if outcome.code == "DEADLINE_EXCEEDED":
        return found if case.hurried else [*found, "took too long"]
    if outcome.rich is None:
        own = re.compile(_OWN.get(outcome.code, "(?!)"))
        health = case.path.startswith("/grpc.health") and outcome.code == "NOT_FOUND"
        if not health and not own.match(outcome.message):
            found.append(f"untyped {outcome.code}: {outcome.message}")
        return found
    if outcome.code not in DOCUMENTED:
        found.append(f"undocumented {outcome.code}: {outcome.message}")
    status = _status(outcome)
    info = _info(status)
    reason = "" if info is None or info.domain != "mora-serve" else info.reason
    if not re.fullmatch("[A-Z][A-Z0-9_]*", reason):
        found.append(f"{outcome.code} without a reason: {outcome.message}")
    if status is not None and status.message != outcome.message:
        found.append("its two messages differ")
    return found


def _status(outcome: Outcome) -> Any:
    if outcome.rich is None:
        return None
    try:
        return status_pb2.Status.FromString(outcome.rich)
    except DecodeError:
        return None


def _info(status: Any) -> Any:
    info = error_details_pb2.ErrorInfo()
    return info if status and any(d.Unpack(info) for d in status.details) else None


def _told(outcome: Outcome) -> str:
    """All text that the status carries."""
    texts = [outcome.message]
    violation, status = error_details_pb2.BadRequest(), _status(outcome)
    for detail in status.details if status else ():
        if detail.Unpack(violation):
            texts += [v.description for v in violation.field_violations]
    texts += [f"{k}={v}" for k, v in outcome.trailing if isinstance(v, str)]
    return "\n".join(texts)


def samples(port: int) -> list[Any]:
    """The server's metrics."""
    url = f"http://127.0.0.1:{port}/metrics"
    text = urllib.request.urlopen(url, timeout=30).read().decode()
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def untyped_calls(port: int) -> int:
    """Calls that ended in a fault of the server's own, as it counts, seen by clients or not."""
    return int(
        sum(
            s.value
            for s in samples(port)
            if s.name == "mora_grpc_requests_total" and s.labels["code"] in ("INTERNAL", "UNKNOWN")
        )
    )


def wait_until_idle(port: int, seconds: float = 60.0) -> int:
    """How many requests the engine still has when nobody waits for any; 0 as a rule."""
    names = ("mora_num_requests_running", "mora_num_requests_waiting")
    end = time.monotonic() + seconds
    while (left := int(sum(s.value for s in samples(port) if s.name in names))) > 0:
        if time.monotonic() > end:
            break
        time.sleep(0.5)
    return left


def cpu_seconds(pid: int) -> float:
    """What a process has computed, on Linux; 0 elsewhere."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
