"""What a newcomer waits for in a fresh clone: ``make demo`` with installation and once more, tests.

Clones the repository's last commit into a temporary directory, without the environment that runs
this; needs git, make and a package index. ``--test`` also runs ``make test`` there, whose own
tools are then installed on top.

    python -m benchmarks.fresh_clone --test --json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--python", default="python3", help="the interpreter to start from")
    parser.add_argument("--test", action="store_true", help="run `make test` as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(report.ROOT), str(clone)], check=True)
        runs = {
            "fresh": make(clone, args.python, "demo"),
            "installed": make(clone, args.python, "demo"),
        }
        if args.test:
            runs["test"] = make(clone, args.python, "test")
    report.emit(
        {
            "demo_ok": runs["fresh"]["status"] == runs["installed"]["status"] == 0,
            "fresh_seconds": runs["fresh"]["seconds"],
            "installed_seconds": runs["installed"]["seconds"],
            "test_ok": runs["test"]["status"] == 0 if args.test else None,
            "test_seconds": runs["test"]["seconds"] if args.test else None,
            "environment": report.environment(),
        }
    )


def make(clone: Path, python: str, target: str) -> dict[str, Any]:
    """Run ``make target`` as a newcomer's shell would; its exit status and seconds."""
    leave_out = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environ = {k: v for k, v in os.environ.items() if k not in leave_out}
    start = time.monotonic()
    done = subprocess.run(
        ["make", target, f"PYTHON={python}"], cwd=clone, env=environ, stdout=sys.stderr, check=False
    )
    return {"status": done.returncode, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    main()
