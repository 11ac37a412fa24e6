"""What the runner takes of the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mora_serve.engine.runner import allowed_cores


@pytest.mark.parametrize(
    ("text", "cores"),
    [("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("max 100000", 8), ("", 8)],
)
def test_a_containers_quota_bounds_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cores: int
) -> None:
    """Threads beyond it would wait for each other, and be stopped in turn."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    quota.write_text(f"{text}\n")
    assert allowed_cores(quota) == cores


def test_without_a_quota_it_is_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert allowed_cores(tmp_path / "none") == 2
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert allowed_cores(tmp_path / "none") == 4


def test_the_engine_is_imported_without_triton() -> None:
    """There are no wheels of it for every system; its kernels are imported where they run."""
    code = "import sys; sys.modules['triton'] = None; import mora_serve.engine.engine"
    subprocess.run([sys.executable, "-c", code], check=True)
