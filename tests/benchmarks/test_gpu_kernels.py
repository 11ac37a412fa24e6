"""The measurement of the adapter product, in small and without its times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_kernels, lora_peers


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a card this process compiles kernels")
def test_each_step_is_compared_with_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the peers' kernels ours are measured all the same, and the lack is said."""
    out = tmp_path / "kernels.json"
    args = ["--interpret", "--peers", str(tmp_path / "none"), "--out", str(out)]
    assert gpu_kernels.main(args) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(out.read_text())
    assert result["interpreted"]
    assert [(r["kind"], r["rows"]) for r in result["rows"]] == [
        ("distinct", 1),
        ("uniform", 3),
        ("skewed", 3),
        ("distinct", 3),
    ]
    assert result["within_rounding"]
    assert result["repeats"]
    assert "peers" in result["peers_failed"]
    assert "least_times_faster" not in result


def test_a_wrong_product_is_found() -> None:
    step = gpu_kernels._Step(gpu_kernels.TINY, [0, 1])
    assert not step._within({site: y for site, (_, y) in step.inputs.items()})


def test_steps_are_of_the_kinds_that_they_say() -> None:
    found = gpu_kernels.steps(gpu_kernels.Sizes())
    assert [rows for _, rows, _ in found] == [1] + [16] * 3 + [64] * 3 + [256] * 3
    for kind, rows, adapters in found:
        assert len(adapters) == rows
        assert set(adapters) == set(range(max(adapters) + 1))
        if kind == "distinct":
            assert len(set(adapters)) == rows
        if kind == "uniform":
            assert set(adapters) == {0}
        if kind == "skewed":
            assert 1 < len(set(adapters)) < rows


def test_a_folder_without_the_peers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportError):
        lora_peers.load(tmp_path)


def test_the_table_has_a_row_for_each_step() -> None:
    row = {"kind": "skewed", "rows": 16, "adapters": 7, "times_faster": 1.5}
    result = {"rows": [{**row, "microseconds": {"tiles_of_1": 20.0, "vllm": 30.0}}]}
    assert gpu_kernels.table(result).splitlines()[2] == "| skewed | 16 | 7 | 20.0 | 30.0 | 1.50 |"
