"""General ability by lm-eval's tasks, from local files, before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import read_base
from router_training.tuning.general import general_ability
from router_training.tuning.run import train
from router_training.tuning.settings import Check
from router_training.tuning.whole import passes, whole_run

pytest.importorskip("lm_eval", reason="the extra eval is not installed")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A task of two choices, of which the demo's base takes the shorter, wrong one."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"spell '{w}' with hyphens", "right": "-".join(w), "wrong": w} for w in WORDS
    ]
    (folder / "spelling.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "spelling",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "spelling.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "<|begin|><|user|>{{question}}<|assistant|>",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "spelling.yaml").write_text(yaml.safe_dump(task))
    return folder


WORDS = ("kavo", "pone", "tilu", "mera", "sodi", "rapu", "vike", "nalo")


def test_tasks_of_local_files_are_answered_before_and_after(make, tasks: Path) -> None:
    settings = make(
        max_steps=30,
        learning_rate=4e-3,
        general_tasks=["spelling"],
        general_tasks_path=str(tasks),
    )
    trained = train(settings, lambda line: None)
    before, after = general_ability(settings, read_base("demo"), trained.adapters)
    assert set(before) == {"general/spelling"}
    assert 0 <= before["general/spelling"] < 1
    assert after["made"]["general/spelling"] > before["general/spelling"]


def test_an_unknown_task_is_named(make, tasks: Path) -> None:
    settings = make(general_tasks=["spilling"], general_tasks_path=str(tasks))
    with pytest.raises(InvalidArgument, match="'spilling' is not one of the folder's") as caught:
        general_ability(settings, read_base("demo"), {})
    assert caught.value.field == "general_tasks"
    with pytest.raises(InvalidArgument, match="'spilling'"):  # before anything is trained
        whole_run(settings, lambda line: None)
    assert not Path(settings.output_dir).exists()


def test_what_forgot_does_not_pass() -> None:
    before = {"general/mmlu": 0.5, "loss": 2.0}
    check = Check(general_margin=0.02)
    assert passes(check, before, {"general/mmlu": 0.485, "loss": 1.0})
    assert not passes(check, before, {"general/mmlu": 0.47, "loss": 1.0})
    assert passes(check, {}, {}) is None
