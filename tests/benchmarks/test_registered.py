"""``benchmarks.registered``: servers with few and many adapters, asked in turn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import plots, registered, tables
from benchmarks.__main__ import PARTS

FLAGS = {
    "hidden": 128,
    "intermediate": 192,
    "layers": 2,
    "vocabulary": 320,
    "slots": 4,
    "clients": 2,
    "requests": 12,
    "repeat": 1,
    "tokens": 4,
    "poisson-seconds": 1,
}


def test_both_are_asked_alike_and_loads_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = [f"--{k}={v}" for k, v in FLAGS.items()]
    monkeypatch.setattr(
        sys, "argv", ["registered", "--json", *flags, "--compare", "4", "16", "--points"]
    )
    registered.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["failed"] == 0
    rows = {(r["popularity"], r["adapters"]): r for r in result["saturated"]}
    assert rows.keys() == {(kind, n) for kind in registered.KINDS for n in (4, 16)}
    for kind in registered.KINDS:
        few, many = rows[kind, 4], rows[kind, 16]
        assert few["ratio"] == 1.0
        assert few["tokens_per_second"] > 0
        assert few["misses_per_request"] <= 4 / 12
        assert many["misses_per_request"] > few["misses_per_request"]
        assert result["ratio"][kind] == many["ratio"]
        assert many["ratio"] == pytest.approx(many["tokens_per_second"] / few["tokens_per_second"])
    assert all(r["answered"] == r["requests"] > 0 for r in result["poisson"])
    assert len(tables.registered(result).splitlines()) == 2 * (2 + 4) + 1
    plots.save(plots.registered(result), tmp_path / "registered.png")
    assert (tmp_path / "registered.png").stat().st_size > 1000


def test_the_shortened_part_of_all_benchmarks_is_one_that_can_be_measured() -> None:
    part = PARTS["registered"]
    args = registered.arguments((*part.flags, *part.shorter))
    assert args.repeat == 1


def test_too_few_requests_to_keep_the_clients_busy_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        registered.arguments(["--requests", "72", "--clients", "32"])
    assert "three times as many" in capsys.readouterr().err
