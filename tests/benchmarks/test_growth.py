"""Sweeps of the growth benchmark: their points, and figures from their rows."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import growth
from benchmarks.growth import figures
from benchmarks.turns import OURS

SMALL = {"hidden": 128, "intermediate": 192, "layers": 2, "vocabulary": 320, "tokens": 4}


def row(kind: str, value: int, rate: float, system: str = OURS) -> dict[str, object]:
    return {"prompt": value, "adapters": kind, "system": system, "tokens_per_second": rate}


def test_figures_compare_our_last_point_with_our_first() -> None:
    rows = [
        row("none", 16, 100.0),
        row("none", 16, 50.0, "transformers generate"),
        row("distinct", 16, 80.0),
        row("none", 1024, 90.0),
        row("distinct", 1024, 20.0),
    ]
    assert figures({"prompt": rows}) == {
        "prompt_1024_over_16_none": 0.9,
        "prompt_1024_over_16_distinct": 0.25,
    }


def test_every_sweep_has_its_points(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small base; PEFT answers at some points of two sweeps, ``generate`` of one."""
    flags = [f"--{k}={v}" for k, v in {**SMALL, "repeat": 1, "requests": 4}.items()]
    for name, values in (
        *(("active", (1, 2, 4)), ("ranks", (2, 4, 8))),
        *(("prompts", (4, 8, 16)), ("mixtures", (1, 2))),
    ):
        flags += [f"--{name}", *map(str, values)]
    monkeypatch.setattr(sys, "argv", ["growth", "--json", *flags])
    settled, settle = [], growth.Peers.settle

    def noted(peers: growth.Peers, counts: list[int], kinds: list[str]) -> None:
        settled.append((peers.workload.prompt, *kinds))
        settle(peers, counts, kinds)

    monkeypatch.setattr(growth.Peers, "settle", noted)
    growth.main()
    own = growth.Workload.prompt
    assert settled == [(own, "mixed"), (own, "mixed"), (4, "none"), (16, "none")]
    sweeps = json.loads(capsys.readouterr().out.splitlines()[-1])["sweeps"]
    systems = {
        name: [(r[name], r["system"]) for r in rows if r.get("adapters") != "distinct"]
        for name, rows in sweeps.items()
    }
    peft, generate = "PEFT mixed batch", "transformers generate"
    assert systems == {
        "active": [(1, OURS), (1, peft), (2, OURS), (2, peft), (4, OURS), (4, peft)],
        "rank": [(2, OURS), (2, peft), (4, OURS), (8, OURS), (8, peft)],
        "prompt": [(4, OURS), (4, generate), (8, OURS), (16, OURS), (16, generate)],
        "mixture": [(1, OURS), (2, OURS)],
    }
    assert not [r["failure"] for rows in sweeps.values() for r in rows if "failure" in r]
