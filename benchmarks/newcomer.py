"""A newcomer's path, by the commands of docs/quickstart.md, in a fresh clone: commands and seconds.

To the first routed answer (``make demo``, installation included); to an adapter that the server
did not have, uploaded and picked by the router; to live load in the console. Clones the
repository's last commit into a temporary directory; needs git, make and a package index. Seconds
count from the clone; ports that are free take the place of the default ones.

    python -m benchmarks.newcomer --json
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.fresh_clone import make

CLONE = ("git clone", "cd mora-serve")
ANSWER = ("make demo",)
ADAPTER = (
    "make serve",
    ". .venv/bin/activate",
    "mora-serve adapters upload spell mora_serve/demo/bundle/adapters/spell",
    "mora-serve generate \"spell 'stone'\"",
)
SERVING_SECONDS = 180.0


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--python", default="python3", help="the interpreter to start from")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "mora-serve"
        start = time.monotonic()
        subprocess.run(["git", "clone", "-q", str(report.ROOT), str(clone)], check=True)
        out: dict[str, Any] = {"ok": make(clone, args.python, "demo")["status"] == 0}
        out |= _stage("answer", len(CLONE) + len(ANSWER), start)
        with _Served(clone, args.python) as served:
            served.wait()
            served.command(ADAPTER[2])
            answer = served.command(ADAPTER[3])
            out["ok"] &= "s-t-o-n-e" in answer and "spell (router)" in answer
            commands = len(CLONE) + len(ANSWER) + len(ADAPTER)
            out |= _stage("adapter", commands, start)
            page = served.get("/")
            out["ok"] &= "Live load" in page
            out["ok"] &= "mora_generation_tokens_total" in served.get("/metrics")
            out |= _stage("dashboard", commands, start)  # a page to open, no command
    report.emit({**out, "environment": report.environment()})


def _stage(name: str, commands: int, start: float) -> dict[str, Any]:
    return {f"{name}_commands": commands, f"{name}_seconds": time.monotonic() - start}


class _Served:
    """``make serve`` in the clone, until the end of the context."""

    def __init__(self, clone: Path, python: str) -> None:
        self._clone = clone
        self._grpc, self._http = f"127.0.0.1:{_free()}", f"127.0.0.1:{_free()}"
        flags = f"--http-address {self._http} --server.port {self._grpc.rpartition(':')[2]}"
        self._command = ["make", "serve", f"PYTHON={python}"]
        self._command.append(f"ARGS={flags} --server.metrics_port -1")

    def __enter__(self) -> _Served:
        self._process = subprocess.Popen(
            self._command,
            cwd=self._clone,
            env=self._environ(),
            stdout=sys.stderr,
            start_new_session=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(60)

    def wait(self) -> None:
        """Until it serves. Raises TimeoutError."""
        until = time.monotonic() + SERVING_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            try:
                self.get("/healthz")
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise TimeoutError("the server does not serve")

    def get(self, path: str) -> str:
        """What the HTTP port answers. Raises OSError where it is no page."""
        with urllib.request.urlopen(f"http://{self._http}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def command(self, text: str) -> str:
        """What a command of the page prints, in the clone's environment."""
        done = subprocess.run(
            ["bash", "-euc", f". .venv/bin/activate\n{text} --address {self._grpc}"],
            cwd=self._clone,
            env=self._environ(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout + done.stderr

    def _environ(self) -> dict[str, str]:
        leave_out = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
        return {k: v for k, v in os.environ.items() if k not in leave_out}


def _free() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    main()
