"""The measurement for machines with a card, where there may be none."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from benchmarks import (
    gpu,
    gpu_base,
    gpu_demo,
    gpu_peft,
    gpu_processes,
    gpu_products,
    gpu_shown,
)
from benchmarks.claims import read_claims
from benchmarks.gpu_figures import figures
from benchmarks.report import ROOT
from mora_serve.core import Decision, Mixture, Source, TokenOut
from mora_serve.demo.bundle import Example

IN_PROCESS = ("card", "steps", "first", "loads", "peft", "products")


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
    assert measured["early_launches"] is False  # there is no card
    assert measured["not_captured"] == []
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


def test_without_bitsandbytes_peft_has_the_same_weights_in_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a card whose image lacks it; the logits are those of the base all the same."""
    cpu = torch.device("cpu")
    base = gpu_base.random_base(gpu_base.TINY, cpu, torch.float32)
    monkeypatch.setattr(gpu_peft, "has_bitsandbytes", lambda: False)
    model = gpu_peft.transformers_model(base)
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    assert gpu_peft.logits_error(base, model) < 1e-5


def test_products_are_measured_by_every_way_that_there_is(measured: dict[str, Any]) -> None:
    part = measured["products"]
    assert part["within_rounding"]
    assert part["repeats"]
    ways = {row["kind"]: set(row["seconds"]) for row in part["rows"]}
    assert set(ways) == set(gpu_products.KINDS)
    assert {"kernel, table", "kernel, tree", "kernel, dense", "dense"} <= ways["nf4"]
    for kind in ("groups of 128", "groups of 128, in act-order"):
        assert ways[kind] == {"kernel, cast", "kernel, bits", "kernel, dense", "dense"}


def test_a_wrong_product_is_found() -> None:
    weight = gpu_base.random_groups(64, 64, torch.device("cpu"), ordered=True)

    def careless(weight: Any, x: torch.Tensor) -> torch.Tensor:
        """Takes the inputs as they come."""
        out: torch.Tensor = x @ weight._sorted(x.dtype, 0, 64).T
        return out

    right = gpu_products._checked(lambda w, x: w.matmul(x), weight, torch.float32)
    wrong = gpu_products._checked(careless, weight, torch.float32)
    assert right[0] < 1e-6 < 0.1 < wrong[0]


def test_a_way_that_a_card_refuses_costs_no_other_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is named with the reason, and where it is one of ours the claim does not hold."""

    def broken(weight: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    ways = {"dense": lambda w, x: w.matmul(x), "kernel, table": broken}
    monkeypatch.setattr(gpu_products, "known_ways", lambda device, dtype: ways)
    part = gpu_products.measure(
        *(gpu_base.TINY, torch.device("cpu"), torch.float32, 1e9, lambda work: 1.0),
        *((1,), ("o",), 1),
    )
    assert set(part["refused"]) == {f"kernel, table: {kind}" for kind in gpu_products.KINDS}
    assert "no kernel image" in part["refused"]["kernel, table: nf4"]
    assert {row["fastest"] for row in part["rows"]} == {"dense"}
    assert part["largest_error"] < 1e-6
    assert not part["within_rounding"]


def test_answers_that_part_are_wrong_unless_at_a_near_tie() -> None:
    def answer(*tokens: tuple[int, float], top: float = -9.0) -> Any:
        found = tuple(TokenOut(i, p, ((7, top),)) for i, p in tokens)
        return SimpleNamespace(tokens=found, decision=base_alone, text="")

    base_alone = Decision(Mixture(()), Source.BASE)
    example = Example("base", "a prompt")
    same, parted = answer((1, -0.1), (2, -0.1)), answer((1, -0.1), (7, -0.1))
    near = answer((1, -0.1), (2, -0.69), top=-0.71)
    for cpu, card, equal, wrong in (
        (same, same, 1, 0),
        (same, parted, 0, 1),
        (near, parted, 0, 0),
        (same, answer((1, -0.1)), 0, 1),
    ):
        found = gpu_demo.compared([example], [cpu], [card])
        assert (found["equal"], found["wrong"]) == (equal, wrong)
        assert found["parted_at_near_ties"] == 1 - equal - wrong
        assert found["problems"] == []


def test_every_figure_of_a_claim_is_one_that_the_measurement_has() -> None:
    steps = [
        {"requests": n, "adapters": kind, "over_floor": 1.5, "tokens_per_second": 9.0}
        for n in (1, 16, 32, 64)
        for kind in ("none", "distinct", "mixtures")
    ]
    checked = {"within_rounding": True, "repeats": True}
    result = {
        "steps": steps,
        "first": [{"streams": n, "first_token_seconds": 0.01} for n in (1, 32)],
        "loads": {"p99_ratio": 1.0},
        "peft": {"tokens_per_second": 1.0, "logits_error": 0.0},
        "products": checked,
        "kernels": {**checked, "least_times_faster": 2.0},
        "groups": {"gptq_logits": 0.0, "awq_logits": 0.0, "wrong_tokens": 0},
        "demo": {"wrong": 0, "other_mixtures": 0},
        "tests": {"failures": 0, "errors": 0, "status": 0},
    }
    claims = read_claims(ROOT / "benchmarks" / "claims.toml")
    named = {c.figure for c in claims if c.command == "python -m benchmarks.gpu --json"}
    assert len(named) >= 17
    assert named <= {f"figures.{name}" for name in figures(result)}


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_processes, "NEEDED", {"torch": "torch", "none.such": "none-such", "nil": "nil"}
    )
    assert gpu_processes.missing() == ["none-such", "nil"]


def test_what_was_measured_can_be_shown(measured: dict[str, Any]) -> None:
    found = {
        "demo": {"error": "left out"},
        "groups": {"gptq_logits": 1e-6, "awq_logits": 2e-6, "wrong_tokens": 0, "rows": []},
        "kernels": {"within_rounding": True, "repeats": True, "rows": [{"rows": 1}]},
        "four_bit_products": [{"kind": "nf4", "out": 6, "in": 4, "by_rows": {"1": "dense"}}],
        "figures": figures(measured),
    }
    result = {**measured, **found}
    result = json.loads(json.dumps(result))
    text = gpu_shown.table(result)
    assert "**demo**: left out" in text
    assert "| one adapter for all |" not in text
    assert "x floor" in text
    assert "| nf4 | 6 x 4 | dense |" in text
    assert "| groups of 128, in act-order | 64 x 64 | 1 |" in text
    gpu_shown.plot(result)


def test_figures_are_those_that_were_measured() -> None:
    rows = [
        {"requests": n, "adapters": kind, "over_floor": 1.5, "tokens_per_second": rate}
        for n, kind, rate in ((1, "distinct", 9.0), (32, "none", 100.0), (32, "distinct", 90.0))
    ]
    result = {"steps": rows, "peft": {"error": "no bitsandbytes"}, "tests": {"status": 0}}
    assert figures(result) == {
        "step_1_over_floor": 1.5,
        "distinct_32_over_none": 0.9,
        "tests_status": 0,
    }


def test_an_engine_that_cannot_start_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that need one say why, and take no time."""
    tried = []

    def broken(self: gpu.Measurement) -> None:
        tried.append(1)
        raise ValueError("no card like this")

    monkeypatch.setattr(gpu.Measurement, "_started", broken)
    run = gpu.Measurement("cpu")
    for name in ("first", "loads"):
        run.run(name)
    assert run.result["first"]["error"] == "ValueError: no card like this"
    assert run.result["loads"]["error"] == "RuntimeError: no engine: ValueError: no card like this"
    assert len(tried) == 1


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
