"""``benchmarks.residency``: the pace of streams alone, and beside new adapters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import plots, residency, tables

FLAGS = {
    "hidden": 128,
    "intermediate": 192,
    "layers": 2,
    "vocabulary": 320,
    "rank": 4,
    "streams": 3,
    "adapters": 3,
    "seconds": 0.6,
    "repeat": 2,
}


def test_every_new_adapter_answers_beside_the_streams(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["residency", "--json", *(f"--{k}={v}" for k, v in FLAGS.items())]
    )
    monkeypatch.setattr(residency, "SETTLE_SECONDS", 0.1)
    residency.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    late = [e for e in result["errors"] if "too late" in e]  # as the machine has it
    assert result["errors"] == late
    assert result["failed"] == len(late)
    assert result["registered_and_used"] == 2 * 3
    for kind in ("quiet", "busy"):
        curve = result["curve_ms"][kind]
        assert curve == sorted(curve)
        assert len(curve) == len(result["percentiles"])
        assert curve[0] > 0
    a, b = ({k: r[k]["p99"] for k in ("quiet", "busy")} for r in result["rounds"])
    assert result["ratio"]["p99"] == pytest.approx(
        (a["busy"] / a["quiet"] + b["busy"] / b["quiet"]) / 2
    )
    lines = tables.residency(result).splitlines()
    assert len(lines) == 2 + 5
    assert lines[-1].startswith(f"| failed or late, of 6 | {len(late)} |")
    worse = tables.residency({**result, "failed": 5}).splitlines()
    assert worse[-1].startswith("| failed or late, of 6 | 5 |")
    plots.save(plots.residency(result), tmp_path / "residency.png")
    assert (tmp_path / "residency.png").stat().st_size > 1000
