"""The measurement for machines with a card, where there may be none."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from benchmarks import gpu, gpu_shown
from benchmarks.report import ROOT

IN_PROCESS = ("card", "steps", "first", "loads", "peft")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a card")
def test_without_a_card_it_says_so_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    shown = capsys.readouterr()
    assert "no CUDA device" in shown.err
    assert shown.out == ""


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Every part that starts no process of its own, in small."""
    run = gpu.Measurement("cpu")
    for name in IN_PROCESS:
        run.run(name)
    run.close()
    return run.result


def test_every_part_runs_in_small_by_the_kernels_of_a_card(measured: dict[str, Any]) -> None:
    assert {name: measured[name] for name in IN_PROCESS if "error" in measured[name]} == {}
    assert measured["kernels_used"] == "CudaForward"
    cases = [(row["requests"], row["adapters"]) for row in measured["steps"]]
    assert cases == [(1, "none"), (1, "distinct")]
    assert all(row["step_seconds"] > row["forward_seconds"] > 0 for row in measured["steps"])
    assert measured["loads"]["loads"] > 0


def test_a_step_s_bytes_are_each_weight_and_adapter_once(measured: dict[str, Any]) -> None:
    """By hand for the small base: a layer, hidden 64, 2 heads and 1 of 32, rank 4, float32."""
    linear = 128 * 64 + 64 * 64 + 128 * 64 + 64 * 64
    alone, mixed = (row["bytes"] for row in measured["steps"])
    assert alone["4-bit weights"] == linear // 2 + 4 * linear // 64
    assert alone["head"] == 320 * 64 * 4
    assert alone["adapters"] == 0
    sides = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 64) * 3
    assert mixed["adapters"] == 4 * 4 * sides
    assert mixed["keys and values"] % (2 * 32 * 4) == 0


def test_peft_s_model_is_the_same_base(measured: dict[str, Any]) -> None:
    assert measured["peft"]["logits_error"] < 0.02


def test_what_was_measured_can_be_shown(measured: dict[str, Any]) -> None:
    result = {**measured, "demo": {"error": "left out"}, "figures": gpu.figures(measured)}
    result = json.loads(json.dumps(result))
    text = gpu_shown.table(result)
    assert "**demo**: left out" in text
    assert "| one adapter for all |" not in text
    assert "x floor" in text
    gpu_shown.plot(result)


def test_figures_are_those_that_were_measured() -> None:
    rows = [
        {"requests": n, "adapters": kind, "over_floor": 1.5, "tokens_per_second": rate}
        for n, kind, rate in ((1, "distinct", 9.0), (32, "none", 100.0), (32, "distinct", 90.0))
    ]
    result = {"steps": rows, "peft": {"error": "no bitsandbytes"}, "tests": {"status": 0}}
    assert gpu.figures(result) == {
        "step_1_over_floor": 1.5,
        "distinct_32_over_none": 0.9,
        "tests_status": 0,
    }


def test_a_part_that_fails_is_recorded_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: gpu.Measurement) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(gpu.Measurement, "steps", broken)
    assert gpu.main(["--interpret", "--parts", "card", "steps"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == {"error": "RuntimeError: no memory"}
    assert result["card"]["copy_bytes_per_second"] > 0
    assert gpu.main(["--interpret", "--parts", "card", "--minutes", "-1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["card"]["error"].startswith("left out")


def test_what_was_measured_is_written_after_each_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A number that is none, or an end from outside, takes nothing from the other parts."""
    out = tmp_path / "gpu.json"

    def killed(self: gpu.Measurement) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Measurement, "steps", lambda self: {"x": math.nan})
    monkeypatch.setattr(gpu.Measurement, "first", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--interpret", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["card"]["copy_bytes_per_second"] > 0
    assert "not JSON compliant" in result["steps"]["error"]
    assert "first" not in result


def test_processes_of_a_part_end_in_time() -> None:
    """Of the last ones too, so that all is less than ten minutes."""
    assert gpu.Measurement("cpu").left(150.0) == 150.0
    assert 50 < gpu.Measurement("cpu", time.monotonic() + 60).left(150.0) <= 60
    assert gpu.Measurement("cpu", time.monotonic() - 60).left(150.0) == 1.0
    begun = gpu.Measurement("cpu", time.monotonic() + 0.5)
    start = time.monotonic()
    begun.run("tests")  # a process that needs longer to import torch than it is given
    assert begun.result["tests"]["status"] == -1
    assert time.monotonic() - start < 60


def test_the_tests_that_it_runs_are_there() -> None:
    assert [path for path in gpu.TESTS if not (ROOT / path).exists()] == []
