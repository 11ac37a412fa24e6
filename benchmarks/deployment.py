"""deploy/ against its schemas and linters: the tests that hold it, counted.

Helm's own library renders the chart, whose objects are checked against Kubernetes' schemas;
hadolint reads the Dockerfile, the compose specification the compose files, systemd-analyze the
unit, promtool the rules. A live server is run as the images run it. Needs the extra ``deploy`` and
Debian's packages prometheus and systemd; what a missing one leaves out counts as skipped.

    python -m benchmarks.deployment --json
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import report

SECONDS = 570.0


def main() -> None:
    """Run the tests of tests/deploy and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.parse_args()
    report.emit({**measure(), "environment": report.environment()})


def measure() -> dict[str, Any]:
    """How the tests ended, and of what each file has how many."""
    with tempfile.TemporaryDirectory(prefix="mora-deploy-") as name:
        results = Path(name, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", "tests/deploy", f"--junitxml={results}"]
        # hadolint stands beside this interpreter.
        beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        done = subprocess.run(
            command,
            cwd=report.ROOT,
            env={**os.environ, "PATH": beside, "OMP_NUM_THREADS": "1"},
            stdout=sys.stderr,
            timeout=SECONDS,
        )
        if not results.exists():
            raise RuntimeError(f"pytest ended with status {done.returncode} and no results")
        cases = list(ElementTree.parse(results).iter("testcase"))  # noqa: S314 - pytest wrote it
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    reasons = {str(c.find("skipped").get("message")) for c in skipped}  # type: ignore[union-attr]
    return {
        "checks": len(cases),
        "passed": len(cases) - len(failed) - len(skipped),
        "failed": len(failed),
        "skipped": len(skipped),
        "skipped_because": sorted(reasons),
    }


if __name__ == "__main__":
    main()
