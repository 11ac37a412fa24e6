"""kill -9 of a whole server at random moments, while a client registers and removes adapters."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.crash_model import NAMES, SEEDS, Model, Step, random_step
from benchmarks.many_adapters import ATTENTION, Template
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess
from mora_serve.errors import MoraError
from mora_serve.model.shape import shape_from_config

KINDS = ("register", "unregister", "pin", "card")  # the router is the bundle's
WHILE_STARTING = 4  # every so many cycles it is killed before it serves
START_SECONDS = 6.0


def of_server(folder: Path, cycles: int, seconds: float, seed: int) -> dict[str, Any]:
    """Kill servers on one state, one after another, each at most ``seconds`` after it serves."""
    rng = random.Random(seed)
    directories = make_adapters(folder / "adapters")
    seeds: dict[str, int] = {}  # of the digests that were seen
    model, wrong, changes, unfinished, starts = Model(), [], 0, 0, []
    allowed = [model]
    for cycle in range(cycles + 1):
        with ServerProcess({"server.state": folder / "state", "base.model": "demo"}) as process:
            if cycle % WHILE_STARTING == WHILE_STARTING - 1 and cycle < cycles:
                time.sleep(rng.uniform(0.5, START_SECONDS))
                _kill(process)
                continue
            with Client(process.address, timeout=60.0) as client:
                starts.append(process.wait_until_ready(client, 300.0))
                found = held(client, seeds)
                if found not in allowed:
                    wrong.append(f"cycle {cycle}: {allowed[0].difference(found)}")
                wrong += [f"cycle {cycle}: {text}" for text in unserved(client, found)]
                if "registry:" in process.whole_log:
                    wrong.append(f"cycle {cycle}: its log tells of damage")
                model = found
                if cycle == cycles:
                    break
                killer = threading.Timer(rng.uniform(0.05, seconds), _kill, (process,))
                killer.start()
                done, begun = drive(client, model, directories, seeds, rng)
                killer.join()
        changes += len(done)
        unfinished += begun is not None
        for step in done:
            model = model.after(step)
        allowed = [model] if begun is None else [model, model.after(begun)]
        report.log(f"server {cycle + 1}/{cycles}: {len(done)} changes; {wrong[-1:]}")
    return {
        "cycles": cycles,
        "changes": changes,
        "killed_in_a_change": unfinished,
        "slowest_start_seconds": round(max(starts), 1),
        "wrong": len(wrong),
        "what": wrong[:20],
    }


def make_adapters(folder: Path) -> list[Path]:
    """Small adapters of the bundled base, a directory each."""
    config = json.loads((bundle_path() / "base" / "config.json").read_text())
    template = Template(shape_from_config(config), 4, ATTENTION)
    directories = [folder / str(seed) for seed in range(SEEDS)]
    for seed, directory in enumerate(directories):
        template.write(directory, seed)
    return directories


def drive(
    client: Client, model: Model, directories: list[Path], seeds: dict[str, int], rng: random.Random
) -> tuple[list[Step], Step | None]:
    """Change adapters until the server is gone; what was done, and what was begun then."""
    done: list[Step] = []
    while True:
        step = random_step(rng, model)
        if step.kind not in KINDS:
            continue
        try:
            ask(client, step, directories, seeds)
        except MoraError as e:
            if e.code not in ("UNAVAILABLE", "UNKNOWN", "CANCELLED"):
                raise
            return done, step
        done.append(step)
        model = model.after(step)


def ask(client: Client, step: Step, directories: list[Path], seeds: dict[str, int]) -> None:
    """Make one change over gRPC."""
    match step.kind:
        case "register":
            made = client.upload_adapter(
                step.name, directories[step.seed], replace=True, tasks=[f"t{step.seed}"]
            )
            seeds[made.digest] = step.seed
        case "unregister":
            client.unregister_adapter(step.name)
        case "pin":
            client.pin_adapter(step.name, bool(step.seed))
        case "card":
            client.update_adapter(step.name, tasks=[f"u{step.seed}"])


def held(client: Client, seeds: dict[str, int]) -> Model:
    """What the server holds of our names; a content that was never acknowledged has its task."""
    found = {}
    for adapter in client.list_adapters():
        if adapter.name in NAMES:
            tasks = "".join(adapter.card.tasks)
            seed = seeds.setdefault(adapter.digest, int(tasks[1:]))
            found[adapter.name] = adapter.version, seed, adapter.pinned, tasks
    return Model(found)


def unserved(client: Client, model: Model) -> list[str]:
    """The adapters that cannot be asked."""
    complaints = []
    for name in model.adapters:
        try:
            client.generate("spell the word kavo", adapters={name: 1.0}, max_tokens=1)
        except MoraError as e:
            complaints.append(f"{name} cannot be asked: {e.message}")
    return complaints


def _kill(process: ServerProcess) -> None:
    os.kill(process.pid, signal.SIGKILL)
