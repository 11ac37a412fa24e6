"""The commands of deploy/ray/README.md, as they stand there: two replicas, and an answer.

What comes after ``pip install`` in its first block: ``serve run`` in the background, the client's
command again and again until it is answered. Then how many slots of adapters the gateway counts
over its replicas, by its metrics. The ports are the default ones (50051, 9464): they must be free.

    python -m benchmarks.ray_commands --json
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import metrics, report
from mora_serve.config import DEFAULT_SLOTS, Config
from mora_serve.demo.process import environment

READY_SECONDS = 240.0
END_SECONDS = 60.0
BIN = Path(sys.executable).parent


def main() -> None:
    """Run the commands and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    report.emit({**run(*commands()), "environment": report.environment()})


def commands() -> tuple[str, str]:
    """The server's and the client's."""
    text = (report.ROOT / "deploy" / "ray" / "README.md").read_text()
    block = text.partition("\n    ")[2].partition("\n\n")[0]
    install, serve, ask = (line.partition("  #")[0].strip() for line in block.splitlines())
    if not (install.startswith("pip ") and serve.startswith("serve ") and "mora-serve" in ask):
        raise RuntimeError("the README's first block is another one")
    return serve, ask


def run(serve: str, ask: str) -> dict[str, Any]:
    """What they give; RuntimeError where the server ends or nothing is answered in time."""
    start = time.monotonic()
    process = subprocess.Popen(
        [str(BIN / "serve"), *shlex.split(serve)[1:]],
        cwd=report.ROOT,
        env={**environment(), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=sys.stderr,
        start_new_session=True,
    )
    try:
        answer = _answer([sys.executable, "-m", "mora_serve", *shlex.split(ask)[1:]], process)
        seconds = time.monotonic() - start
        replicas = _replicas()
    finally:
        process.send_signal(signal.SIGINT)  # as from a terminal: Ray goes with it
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return {"answer": answer, "replicas": replicas, "answer_seconds": seconds}


def _answer(command: Sequence[str], server: subprocess.Popen[bytes]) -> str:
    until, why = time.monotonic() + READY_SECONDS, "the server has ended"
    while time.monotonic() < until and server.poll() is None:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=environment()
        )
        if done.returncode == 0:
            return done.stdout.splitlines()[0]
        why = done.stderr
        time.sleep(1)
    raise RuntimeError(f"no answer: {why}")


def _replicas() -> int:
    """By the slots that the gateway counts; it looks at them every second."""
    each = Config().adapters.slots or DEFAULT_SLOTS
    slots, until = 0.0, time.monotonic() + 30
    while slots < 2 * each and time.monotonic() < until:
        time.sleep(0.5)
        slots = metrics.totals(Config().server.metrics_port)["mora_adapter_slots"]
    return int(slots) // each


if __name__ == "__main__":
    main()
