"""What the source distribution holds. That it installs and runs is a claim: it takes minutes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import wheel


def test_the_source_distribution_has_what_a_build_elsewhere_reads(tmp_path: Path) -> None:
    def step(name: str, command: Sequence[object], cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    sources = wheel.source_distribution(tmp_path / "tree", Path(sys.executable), step)
    assert wheel.missing_sources(sources) == []
    with tarfile.open(sources) as archive:
        names = archive.getnames()
    assert not [n for n in names if n.endswith((".so", ".pyc")) or "node_modules" in n]
