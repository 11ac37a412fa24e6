"""A Node client of the API: proto/examples/node, its packages installed, against a real server.

The stubs are made by @grpc/proto-loader from the .proto files. The conversation registers by path
and by upload, routes, generates, streams, cancels, is refused, unregisters; each step is checked.
Needs node, npm and a package index; takes about half a minute.

    python -m benchmarks.node_client --json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from mora_serve.client import Client
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess

EXAMPLE = report.ROOT / "proto" / "examples" / "node"
NPM_CI = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")


def main() -> None:
    """Run the conversation and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        example = install(Path(folder))
        report.emit({**converse(example), "environment": report.environment()})


def install(folder: Path) -> Path:
    """A copy of the example below ``folder``, where its .proto files are, with its packages.

    Raises CalledProcessError, whose ``stderr`` says why.
    """
    shutil.copytree(
        report.ROOT / "proto", folder / "proto", ignore=shutil.ignore_patterns("node_modules")
    )
    example = folder / "proto" / "examples" / "node"
    subprocess.run(NPM_CI, cwd=example, check=True, capture_output=True, text=True, timeout=180)
    return example


def converse(example: Path) -> dict[str, Any]:
    """How many steps were checked, and which went wrong."""
    adapters = bundle_path() / "adapters"
    with ServerProcess({"adapters.root": adapters}) as server:
        with Client(server.address) as client:
            server.wait_until_ready(client)
        command = ["node", "conversation.mjs", "--address", server.address]
        said, status = run_script(
            [*command, "--adapter", str(adapters / "uppercase")], example, seconds=180
        )
    lock = json.loads((example / "package-lock.json").read_text())["packages"]
    return {
        "checks": said["checks"],
        "failed": len(said["failed"]),
        "failures": said["failed"],
        "status": status,
        "node": said["node"],
        "grpc_js": lock["node_modules/@grpc/grpc-js"]["version"],
    }


def run_script(command: list[str], folder: Path, *, seconds: float) -> tuple[dict[str, Any], int]:
    """The JSON object of a script's last line, and its exit status."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    report.log(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), done.returncode


if __name__ == "__main__":
    main()
