"""Bases of whole numbers in groups are served, and not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.families import make_base
from benchmarks.group_checkpoints import Recipe, write
from mora_serve.errors import ConfigError, InvalidArgument
from router_training import joint_command
from router_training.__main__ import main
from router_training.trainable import check_trainable
from router_training.tuning.run import train
from router_training.tuning.settings import tune_settings


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    make_base("llama2", root / "plain", num_hidden_layers=1)
    for method in ("gptq", "awq"):
        write(root / "plain", root / method, Recipe(method))
    return root


def test_the_reason_and_what_to_do_are_said(bases: Path) -> None:
    """Of GPTQ an adapter of the original fits; of AWQ it may not, as its inputs are scaled."""
    for base in ("demo", str(bases / "plain")):
        check_trainable(base, "base_model")
    for method, remedy in (("gptq", "the adapter on this$"), ("awq", "on that, as AWQ scales")):
        with pytest.raises(InvalidArgument, match=f"^base: .* stored as {method}.*{remedy}") as e:
            check_trainable(str(bases / method), "base")
        assert e.value.field == "base"
        assert str(bases) not in e.value.message
    with pytest.raises(ConfigError):
        check_trainable(str(bases), "base")


@pytest.mark.parametrize("settings", [{}, {"adapter": "lora"}, {"adapter": "full"}])
def test_tuning_refuses_them_before_anything_else(
    bases: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    """Whatever is trained, rows or not."""
    made = tmp_path / "made"
    common = {"datasets": [{"path": "none.jsonl"}], "output_dir": str(made)}
    with pytest.raises(InvalidArgument, match=r"^base_model: .* stored as gptq"):
        train(tune_settings({"base_model": str(bases / "gptq"), **common, **settings}), print)
    assert not made.exists()


def test_joint_training_refuses_them(bases: Path, tmp_path: Path) -> None:
    settings = joint_command.JointSettings(
        base=str(bases / "gptq"), data=("none.jsonl",), out=str(tmp_path / "out")
    )
    with pytest.raises(InvalidArgument, match=r"^base: .* stored as gptq"):
        joint_command.run(settings, print)


def test_the_command_ends_with_the_reason(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    values = {"base_model": str(bases / "awq"), "datasets": [{"path": str(rows)}]}
    file.write_text(json.dumps({**values, "output_dir": str(tmp_path / "made")}))
    assert main(["adapter", str(file)]) == 2
    assert main(["check", str(file)]) == 2
    assert capsys.readouterr().err.count("stored as awq") == 2
