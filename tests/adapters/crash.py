"""Processes that share a registry and are killed, run by test_crash.py.

Forks are cheap, so each case is a real process that a real SIGKILL ends. The boundaries come from
Python's audit events: the process kills itself right before its n-th change or read of the
file system.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mora_serve.adapters.registry import Registry
from tests.adapters.make import LIMITS, SHAPE, adapter

EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.listdir")
ADAPTERS = [adapter(seed, rank=1) for seed in range(3)]
Step = Callable[[Registry], object]

STEPS: list[Step] = [
    lambda r: r.register("default", "a", ADAPTERS[0], tasks=["one"]),
    lambda r: r.register("default", "b", ADAPTERS[1]),
    lambda r: r.register("default", "a", ADAPTERS[1], replace=True),
    lambda r: r.set_router({"r": b"1"}),
    lambda r: r.pin("default", "b", True),
    lambda r: r.unregister("default", "b"),
    lambda r: r.set_router({"r": b"2"}),
    lambda r: r.register("default", "a", ADAPTERS[2], replace=True),
]


def opened(directory: Path) -> Registry:
    return Registry(directory, LIMITS, SHAPE, snapshot_every=3)


def summary(registry: Registry) -> Any:
    records = [[r.name, r.version, r.digest, r.pinned, r.tasks] for r in registry.all()]
    return [records, registry.router(), registry.revision]


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Start ``work`` in a process; returns its id and the end of a pipe that it can write to."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        work(writing)
        os._exit(0)
    except BaseException as e:
        os.write(2, f"{type(e).__name__}: {e}\n".encode())
    os._exit(1)


def finished(child: int, reading: int) -> tuple[int, bytes]:
    """Wait for a process; its exit code (negative: the signal) and what it wrote."""
    with open(reading, "rb") as pipe:
        output = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), output


def check(directory: Path) -> None:
    """Everything referred to is there and whole; with time, nothing else is."""
    with opened(directory) as registry:
        contents = {a.digest: a for a in ADAPTERS}
        for record in registry.all():
            assert registry.open(record.digest) == contents[record.digest]
        for path in (directory / "tmp").iterdir():
            os.utime(path, (0, 0))
    with opened(directory) as registry:
        router = registry._state.router
        referred = {r.digest for r in registry.all()} | ({router.digest} if router else set())
        assert set(os.listdir(directory / "blobs")) == referred
        assert not os.listdir(directory / "tmp")
        registry.register("default", "after", ADAPTERS[0])


def die_before(event_number: int, directory: Path) -> None:
    """Arrange for SIGKILL at a boundary."""
    count = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        inside = arguments and str(arguments[0]).startswith(str(directory))
        if event in EVENTS and inside and next(count) == event_number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def boundaries(directory: Path) -> int:
    """Kill at every boundary of all steps; returns how many there were."""
    expected = []
    with opened(directory / "expected") as registry:
        expected.append(summary(registry))
        for step in STEPS:
            step(registry)
            expected.append(summary(registry))

    for number in itertools.count(1):
        state = directory / str(number)

        def work(pipe: int, state: Path = state, number: int = number) -> None:
            die_before(number, state)
            registry = opened(state)
            for step in STEPS:
                step(registry)
                os.write(pipe, b".")

        code, acknowledged = finished(*forked(work))
        if code == 0:
            return number - 1
        assert code == -signal.SIGKILL, code
        with opened(state) as registry:
            done = len(acknowledged)
            assert summary(registry) in expected[done : done + 2], (number, done)
        check(state)
    raise AssertionError


def any_moment(directory: Path) -> int:
    """Kill a process that registers without end, ten times; returns the changes it made."""
    rng = random.Random(0)

    def work(pipe: int) -> None:
        with opened(directory) as registry:
            for i in itertools.count():
                registry.register("default", f"n{i % 2}", ADAPTERS[i % 3], replace=True)
                if i % 7 == 0:
                    registry.unregister("default", f"n{i % 2}")
                os.write(pipe, f"{registry.revision}\n".encode())

    for _ in range(10):
        child, reading = forked(work)
        time.sleep(rng.uniform(0.02, 0.1))
        os.kill(child, signal.SIGKILL)
        code, output = finished(child, reading)
        assert code == -signal.SIGKILL
        with opened(directory) as registry:
            assert registry.revision >= int((output.split() or [b"0"])[-1])
        check(directory)
    with opened(directory) as registry:
        return registry.revision


def together(directory: Path) -> int:
    """Three processes change one registry at the same time; returns the changes made."""

    def worker(number: int) -> Callable[[int], None]:
        def work(pipe: int) -> None:
            with opened(directory) as registry:
                made = 0
                for i in range(12):
                    content = ADAPTERS[(i + number) % 3]
                    made += registry.register("default", "shared", content, replace=True)[1]
                    made += registry.register(f"t{number}", f"n{i}", content)[1]
                    if i % 2:
                        registry.unregister(f"t{number}", f"n{i}")
                        made += 1
                os.write(pipe, str(made).encode())

        return work

    running = [forked(worker(number)) for number in range(3)]
    made = 0
    for child, reading in running:
        code, output = finished(child, reading)
        assert code == 0
        made += int(output)
    with opened(directory) as registry:
        assert registry.revision == made, (registry.revision, made)
        for number in range(3):
            assert [r.name for r in registry.list(f"t{number}")] == ["n0", "n10", *(
                f"n{i}" for i in range(2, 10, 2)
            )]  # fmt: skip
    check(directory)
    return made


if __name__ == "__main__":
    scenario = {f.__name__: f for f in (boundaries, any_moment, together)}[sys.argv[1]]
    print(json.dumps(scenario(Path(sys.argv[2]))))
