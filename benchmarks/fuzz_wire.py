"""Mutated calls of every RPC over gRPC to a server in a process of its own.

Each call is made from its method's descriptor (``wire_cases``): plausible, wild or spoilt bytes,
metadata, deadlines and kinds. The server has an access file; most calls have a whole key, some one
for less, one that is over or never was, or none (``wire_keys``). Whatever comes back has to be an
answer of the method's type or a documented, typed status that gives nothing away; UNAUTHENTICATED
or PERMISSION_DENIED where the key is no better. Beside them, one connection for every 50 calls
speaks HTTP/2 as no client of grpc's would (``wire_garbage``). At the end the server has to answer
known prompts, of a tenant that no case names, with the same tokens as before. Then its log (JSON,
with a line for each call) and its audit log are read line by line.

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
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from benchmarks import metrics, report, wire_keys, written
from benchmarks.rich_status import reason_in
from benchmarks.wire_cases import NAMES, Cases, WireCase
from benchmarks.wire_garbage import garbage, strike
from benchmarks.wire_verdict import Outcome, make, spoken, wrong
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess, free_port

PATIENCE = 60.0  # a call that takes longer hangs
AT_ONCE = 32
GARBAGE_EVERY = 50
CHANNELS = 4


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
        self.reasons[reason_in(outcome.rich)] += 1
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
    adapters = directory(root)
    adapters.mkdir(parents=True)
    for name in NAMES[:3]:
        shutil.copytree(bundle_path() / "adapters" / name, adapters / name)
    shutil.copytree(bundle_path() / "router", adapters / "router")
    (adapters / "link").symlink_to(adapters / "reverse")
    file, audit, port = root / "access.toml", root / "audit", free_port()
    wire_keys.write(file, seed)
    flags: dict[str, object] = {
        "adapters.root": adapters.parent,
        "adapters.max_adapters": 40,
        "adapters.max_bytes": 1 << 20,
        "engine.max_tokens": 8,  # a mutated limit must not become work
        "router.feedback": "true",
        "router.feedback_bytes": 1 << 20,
        "server.state": root / "state",
        "server.max_message_bytes": 4 << 20,
        "server.metrics_port": port,
        "server.log_calls": "true",
        "server.log_format": "json",
        "access.file": file,
        "access.audit": audit,
    }
    cases = Cases(bundle_path(), seed, PATIENCE)
    secrets = [str(root), str(report.ROOT), sys.prefix, str(Path.home())]
    key = wire_keys.secret(seed, wire_keys.KEEPER)
    with ServerProcess(flags) as server, Client(server.address, api_key=key) as keeper:
        server.wait_until_ready(keeper)
        prepare(server.address, keeper, root, wire_keys.secret(seed, wire_keys.WHOLE))
        before = answers(keeper, root)
        started, own = time.monotonic(), time.process_time()
        found = run(server.address, cases, numbers, secrets, end, tell)
        took, own = time.monotonic() - started, time.process_time() - own
        running = wait_until_idle(port)
        # Faults of the server's own, as it counts, seen by clients or not.
        untyped = metrics.ended(port, "INTERNAL", "UNKNOWN")
        after = answers(keeper, root)
        cpu = cpu_seconds(server.pid)
        status = server.stop()
        log = written.read(server.whole_log, ("time", "level", "message"), keys(seed))
    audited = written.read(audit.read_text(), ("time", "event", "request_id", "key"), keys(seed))
    wrong_lines = log.wrong + audited.wrong
    wrong = len(found.wrong) + untyped + running + len(wrong_lines) + (status != 0)
    for line in wrong_lines[:20]:
        report.log(line)
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
        "wrong_lines": len(wrong_lines),
        "what_wrong_lines": wrong_lines[:5],
        "log_lines": len(log.lines),
        "log_lines_of_calls": sum("method" in line for line in log.lines),
        "log_lines_of_the_library": log.library,
        "audit_lines": len(audited.lines),
        "audit_events": dict(collections.Counter(line["event"] for line in audited.lines)),
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


def keys(seed: int) -> list[str]:
    """Those that no log may tell."""
    kinds = (*wire_keys.OFTEN, wire_keys.KEEPER)
    return [wire_keys.secret(seed, kind) for kind in kinds]


def directory(root: Path) -> Path:
    """From which the cases' tenant may register."""
    return root / "adapters" / wire_keys.TENANT


def prepare(address: str, keeper: Client, root: Path, key: str) -> None:
    """Adapters for the keeper and for the tenant whose calls the cases are."""
    keeper.upload_adapter("kept", directory(root) / "reverse")
    with Client(address, api_key=key) as fuzzed:
        for name in NAMES[:3]:
            fuzzed.register_adapter(name, name)


def answers(keeper: Client, root: Path) -> list[Any]:
    """What known prompts give, greedily, and what the router of the bundle decides."""
    for file in sorted((directory(root) / "router").iterdir()):
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


def wait_until_idle(port: int, seconds: float = 60.0) -> int:
    """How many requests the engine still has when nobody waits for any; 0 as a rule."""
    names = ("mora_num_requests_running", "mora_num_requests_waiting")
    end = time.monotonic() + seconds
    while (left := int(sum(s.value for s in metrics.samples(port) if s.name in names))) > 0:
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
