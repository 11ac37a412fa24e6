"""``benchmarks.step``: a step beside its floors."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import memory, plots, step, tables
from mora_serve.model.native.library import PHASES, targets
from mora_serve.model.shape import PROJECTIONS, shape_from_config

SMALL = {"hidden": 128, "intermediate": 192, "layers": 2, "vocabulary": 320, "rank": 4}


@pytest.mark.skipif(not targets(torch.float32), reason="no compiler built the native path")
def test_a_step_is_taken_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is made of its phases, its bytes are those of the weights, and it can be drawn."""
    flags = [f"--{k}={v}" for k, v in {**SMALL, "rounds": 2, "steps": 3}.items()]
    monkeypatch.setattr(sys, "argv", ["step", "--json", *flags])
    monkeypatch.setattr(step, "COPY_BYTES", 1 << 20)
    step.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["requests"], r["adapters"]) for r in result["rows"]] == list(step.CASES)
    assert set(result["figures"]) == {f"{k}_{n}_over_products" for n, k in step.CASES}
    assert min(result["figures"].values()) > 0  # over 1 where nothing else runs
    for r in result["rows"]:
        assert r["phase_seconds"].keys() == {*PHASES, step.ENGINE}
        assert all(seconds > 0 for seconds in r["phase_seconds"].values())
    none, one, distinct, mixtures = (r["bytes"] for r in result["rows"][1:])
    shape = shape_from_config(memory.llama_config(128, 192, 2, 320))
    weights = 2 * sum(math.prod(shape.projection(p)) for p in PROJECTIONS)
    # 4 bits a weight and 4 bytes for each 64
    assert none["4-bit weights"] == weights // 2 + 4 * weights // 64
    assert none["adapters"] == 0
    assert distinct["adapters"] == mixtures["adapters"] == 16 * one["adapters"] > 0
    assert len(tables.step(result).splitlines()) == 2 + len(step.CASES)
    plots.save(plots.step(result), tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 1000
