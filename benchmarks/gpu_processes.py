"""Parts of the measurement on a card that run in processes of their own, and what they import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

TEST_CORES = 8  # from which on tests run side by side: compiling takes most of their time
# What parts import, as far as an image for cards may lack it, and the packages that have it
NEEDED = {
    "bitsandbytes": "bitsandbytes",
    "google.rpc": "googleapis-common-protos",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_status": "grpcio-status",
    "hypothesis": "hypothesis",
    "peft": "peft",
    "pytest": "pytest",
    "pytest_asyncio": "pytest-asyncio",
    "pytest_timeout": "pytest-timeout",
}


def json_of(module: str, flags: Sequence[str], timeout: float) -> dict[str, Any]:
    """The JSON that a measurement of its own prints. RuntimeError where it prints none."""
    command = [sys.executable, "-m", module, *flags]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=timeout, check=False
    )
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise RuntimeError(f"{module} ended with status {done.returncode}, no result") from None
    return found


def run_tests(paths: Sequence[str], timeout: float) -> dict[str, Any]:
    """Run pytest on ``paths``; returns counts, seconds and the failed tests' names."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
        if find_spec("xdist") and (os.cpu_count() or 1) >= TEST_CORES:
            command += ["-n", str(TEST_CORES)]
        command += [f"--junitxml={report}", *paths]
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=sys.stderr, timeout=timeout, check=False
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = -1
        result: dict[str, Any] = {"status": status, "seconds": time.monotonic() - start}
        if report.exists():
            suites = list(ET.parse(report).getroot().iter("testsuite"))  # noqa: S314 - our own file
            for name in ("tests", "failures", "errors", "skipped"):
                result[name] = sum(int(suite.get(name, 0)) for suite in suites)
            result["failed"] = [
                f"{case.get('classname')}::{case.get('name')}"
                for suite in suites
                for case in suite.iter("testcase")
                if case.find("failure") is not None or case.find("error") is not None
            ]
        return result


def missing() -> list[str]:
    """The packages that parts need and that are not here."""

    def there(module: str) -> bool:
        try:
            return find_spec(module) is not None
        except ImportError:  # of the package that it is in
            return False

    return [package for module, package in NEEDED.items() if not there(module)]
