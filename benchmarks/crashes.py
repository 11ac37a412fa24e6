"""kill -9 at random moments: of a process that drives the registry, and of the whole server.

What a killed process was told is done has to be there when the state is opened again, what it had
begun may be there as a whole or not at all, and nothing has to be found damaged.

    python -m benchmarks.crashes --json
    python -m benchmarks.crashes --json --shared --server-cycles 0   (a store that servers share)
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import report, tiny
from benchmarks.crash_model import Model, Step, apply, random_step
from mora_serve.adapters.registry import Registry
from mora_serve.adapters.storage import SharedStorage

CYCLES = 280
SERVER_CYCLES = 20
CHILD_SECONDS = 0.5  # a child lives at most so long, its start included
SERVER_SECONDS = 6.0  # a server, from its readiness on
SNAPSHOT_EVERY = 7  # so that most cycles make one


def main() -> None:
    """Kill and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cycles", type=int, default=CYCLES)
    parser.add_argument("--server-cycles", type=int, default=SERVER_CYCLES)
    parser.add_argument("--directory", type=Path, help="where the state is (default: temporary)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", action="store_true", help="registry in a file:// store")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.drive is not None:
        drive(args.drive, args.seed, args.shared)
        return
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        registry = of_registry(Path(folder, "registry"), args.cycles, args.seed, args.shared)
        server: dict[str, Any] = {"cycles": 0, "wrong": 0}
        if args.server_cycles:
            from benchmarks.server_crashes import of_server

            server = of_server(
                Path(folder, "server"), args.server_cycles, SERVER_SECONDS, args.seed
            )
    wrong = registry["wrong"] + server["wrong"]
    report.emit(
        {
            "wrong": wrong,
            "cycles": registry["cycles"],
            "server_cycles": server["cycles"],
            "registry": registry,
            "server": server,
            "environment": report.environment(),
        }
    )


def drive(state: Path, seed: int, shared: bool = False) -> None:
    """Change a registry without end, saying on stdout what is begun and what is done."""
    rng = random.Random(seed)
    with opened(state, shared) as registry:
        model = Model.of(registry)
        while True:
            step = random_step(rng, model)
            _say("begin", step)
            apply(registry, step)
            model = model.after(step)
            _say("done", step)


def of_registry(state: Path, cycles: int, seed: int, shared: bool = False) -> dict[str, Any]:
    """Kill children that drive one registry, one after another."""
    rng = random.Random(seed)
    model, wrong = Model(), []
    steps = torn = unfinished = 0
    for cycle in range(cycles):
        flags = ("--drive", str(state), "--seed", str(cycle), *(["--shared"] if shared else []))
        with _child("benchmarks.crashes", *flags) as child:
            seconds = rng.uniform(0.05, CHILD_SECONDS)
            if cycle % 4:  # the others may be killed while they start
                _wait_for_output(child)
                seconds = rng.uniform(0.0, CHILD_SECONDS / 2)
            time.sleep(seconds)
            os.kill(child.pid, signal.SIGKILL)
            said, _ = child.communicate(timeout=60)
            if child.returncode != -signal.SIGKILL:
                raise RuntimeError(f"the child ended by itself: {child.returncode}")
        done, begun = _read(said)
        steps += len(done)
        for step in done:
            model = model.after(step)
        allowed = [model] if begun is None else [model, model.after(begun)]
        found, complaints = look(state, shared)
        if found not in allowed:
            wrong.append(f"cycle {cycle}: {model.difference(found)}")
        wrong += [f"cycle {cycle}: {text}" for text in complaints]
        unfinished += begun is not None
        torn += begun is not None and found == allowed[-1]
        model = found
        for text in wrong[-1:]:
            report.log(text)
    return {
        "cycles": cycles,
        "changes": steps,
        "killed_in_a_change": unfinished,
        "of_these_made": torn,
        "wrong": len(wrong),
        "what": wrong[:20],
    }


def look(state: Path, shared: bool = False) -> tuple[Model, list[str]]:
    """What a state holds when it is opened, and what is wrong with it.

    Of a shared store it removes what nothing refers to, though it is not a day old.
    """
    complaints: list[str] = []
    with _log_of(complaints), opened(state, shared) as registry:
        model = Model.of(registry)
        for record in registry.all():
            adapter = registry.open(record.digest)  # its sum is formed
            if adapter != tiny.adapter(model.seeds[record.digest], record.rank):
                complaints.append(f"{record.name}: another content")
        referred = {r.digest for r in registry.all()}
        if (router := registry.router()) is not None and set(router) != {"r"}:
            complaints.append("another router")
        blobs = state / "blobs"
        if shared:
            blobs = state / "store" / "blobs"
            for _ in range(2):  # the first marks it
                storage(state).collect(lambda: registry.digests, age=0.0)
        extra = len(list(blobs.glob("*"))) - len(referred) - (router is not None)
        if extra:
            complaints.append(f"{extra} blobs that nothing refers to")
    if any((state / part / "quarantine").exists() for part in ("", "cache")):
        complaints.append("something was set aside")
    return model, complaints


def opened(state: Path, shared: bool = False) -> Registry:
    """The registry of a state."""
    place = storage(state) if shared else state
    return Registry(place, tiny.LIMITS, tiny.SHAPE, snapshot_every=SNAPSHOT_EVERY)


def storage(state: Path) -> SharedStorage:
    """A store that servers share in a directory, and a cache of it."""
    return SharedStorage(f"file://{state / 'store'}", state / "cache", 1 << 30)


def _say(what: str, step: Step) -> None:
    line = json.dumps([what, step]) + "\n"
    os.write(sys.stdout.fileno(), line.encode())


def _read(said: bytes) -> tuple[list[Step], Step | None]:
    """What a child did, and what it had begun."""
    done: list[Step] = []
    begun: Step | None = None
    for line in said.split(b"\n")[:-1]:
        what, (kind, name, seed) = json.loads(line)
        step = Step(kind, name, seed)
        if what == "done":
            done.append(step)
        begun = step if what == "begin" else None
    return done, begun


@contextmanager
def _child(module: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, "-m", module, *args], stdout=subprocess.PIPE, cwd=report.ROOT
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()


def _wait_for_output(child: subprocess.Popen[bytes]) -> None:
    if child.stdout is None or not select.select([child.stdout], [], [], 60.0)[0]:
        raise RuntimeError("the child says nothing")


@contextmanager
def _log_of(complaints: list[str]) -> Iterator[None]:
    """Take what the server logs as complaints."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            complaints.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("mora_serve")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


if __name__ == "__main__":
    main()
