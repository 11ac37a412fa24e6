"""The registry survives kill -9 at any moment, and several processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("scenario", "least"), [("boundaries", 100), ("any_moment", 20), ("together", 60)]
)
def test_the_registry_is_whole_after(scenario: str, least: int, tmp_path: Path) -> None:
    """boundaries: killed before each single operation on the file system, the registry opens with
    all that was acknowledged, every content whole, and nothing left over. any_moment: the same
    at random times. together: three processes lose none of their changes.
    """
    memory = Path("/dev/shm")  # noqa: S108  (nothing here needs a disk, whose fsync takes long)
    parent = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        run = subprocess.run(
            [sys.executable, "-m", "tests.adapters.crash", scenario, directory],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            check=False,
        )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) >= least
