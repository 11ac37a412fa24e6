"""Two servers of the demo bundle with one registry: what one is told, the other does."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.server_crashes import make_adapters
from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess
from mora_serve.errors import NotFound

NAME = "late"
LIMIT = 60.0  # seconds until the other server has to do as told
PAUSE = 0.02


def seen(folder: Path, rounds: int, poll_seconds: float) -> dict[str, Any]:
    """How long it took the one to serve, and to refuse, what the other registered and removed."""
    directories = make_adapters(folder / "adapters")
    served, refused, identical = [], [], 0
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(ServerProcess(_flags(folder, i, poll_seconds))) for i in range(2)
        ]
        clients = [stack.enter_context(Client(p.address, timeout=60.0)) for p in processes]
        for process, client in zip(processes, clients, strict=True):
            process.wait_until_ready(client, 300.0)
        for i in range(rounds):
            told, other = clients if i % 2 else reversed(clients)
            told.register_adapter(NAME, str(directories[i]))
            served.append(_seconds(functools.partial(_answers, other, True)))
            answers = {_ask(client) for client in (told, other)}
            identical += len(answers) == 1
            told.unregister_adapter(NAME)
            refused.append(_seconds(functools.partial(_answers, other, False)))
            report.log(f"{i + 1}: served after {served[-1]:.2f} s, refused after {refused[-1]:.2f}")
    return {
        "rounds": rounds,
        "poll_seconds": poll_seconds,
        "served_seconds": round(max(served), 3),
        "refused_seconds": round(max(refused), 3),
        "slowest_seconds": round(max(served + refused), 3),
        "answers_identical": identical,
    }


def _flags(folder: Path, number: int, poll_seconds: float) -> dict[str, object]:
    return {
        "base.model": "demo",
        "adapters.root": folder / "adapters",
        "server.store": f"file://{folder}/servers",
        "server.state": folder / f"state-{number}",
        "server.store_poll_seconds": poll_seconds,
        "engine.threads": 1,
    }


def _ask(client: Client) -> str:
    return client.generate(
        "reverse stone", adapters={NAME: 1.0}, max_tokens=8, temperature=0.0
    ).text


def _answers(client: Client, so: bool) -> bool:
    """Whether a server answers for the adapter, or (not ``so``) refuses it."""
    try:
        _ask(client)
    except NotFound:
        return not so
    return so


def _seconds(done: Callable[[], bool]) -> float:
    """Seconds until something is so."""
    start = time.monotonic()
    while not done():
        if time.monotonic() - start > LIMIT:
            raise RuntimeError(f"not so after {LIMIT:g} s")
        time.sleep(PAUSE)
    return time.monotonic() - start
