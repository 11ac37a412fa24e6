"""Runs from the command line: what they leave, how they go on, what they refuse."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.preferred import lines, make_pairs
from benchmarks.tuning_rows import task_rows, write_chats, write_settings
from mora_serve.demo.bundle import bundle_path
from router_training.__main__ import main
from router_training.tuning.results import write_card
from router_training.tuning.stopped import RUN_FILE


@pytest.fixture
def config(chats: Path, tmp_path: Path) -> Callable[..., Path]:
    def written(**values: Any) -> Path:
        settings = {
            "base_model": "demo",
            "datasets": [{"path": chats}],
            "output_dir": tmp_path / "made",
            "lora_r": 4,
            "val_set_size": 8,
            "max_steps": 4,
            "learning_rate": 1e-3,
            **values,
        }
        return write_settings(tmp_path / "run.yaml", settings)

    return written


def test_a_run_leaves_what_it_says(config, tmp_path: Path, capsys) -> None:
    assert main(["adapter", str(config())]) == 0
    directory = tmp_path / "made" / "adapter"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["steps"] == 4
    assert manifest["rows"] == {"train": 56, "held_out": 8}
    assert manifest["metrics"]["loss_after"] < manifest["metrics"]["loss_before"]
    card = json.loads((directory / "routing_card.json").read_text())
    assert card["base_fingerprint"] == manifest["base_fingerprint"]
    assert len(card["prompts"]) == 16
    config_written = json.loads((directory / "adapter_config.json").read_text())
    assert config_written["base_model_name_or_path"] == "demo"
    assert not (directory / "README.md").exists()
    lines = (tmp_path / "made" / "metrics.jsonl").read_text().splitlines()
    assert any("loss" in json.loads(line) for line in lines)
    assert str(directory) in capsys.readouterr().out


def test_a_run_is_made_again_to_the_bit_and_goes_on_so_and_refuses_other_rows(
    config, tmp_path: Path, capsys
) -> None:
    assert main(["adapter", str(config(max_steps=4, save_steps=2))]) == 0
    whole = (tmp_path / "made" / "adapter" / "adapter_model.safetensors").read_bytes()
    other_place = config(max_steps=4, save_steps=2, output_dir=tmp_path / "twin", name="made")
    assert main(["adapter", str(other_place)]) == 0
    twin = (tmp_path / "twin" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert twin == whole
    last = tmp_path / "made" / "checkpoints" / "checkpoint-4"
    for file in last.iterdir():  # as if it had been stopped after the second step
        file.unlink()
    last.rmdir()
    assert main(["adapter", str(config(max_steps=4, save_steps=2))]) == 0
    assert "going on from checkpoint-2" in capsys.readouterr().err
    again = (tmp_path / "made" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert again == whole
    other = write_chats(tmp_path / "other.jsonl", task_rows("reverse", 64))
    for values, what in (
        ({"datasets": [{"path": other}]}, "rows"),
        ({"learning_rate": 2e-3}, "settings"),
    ):
        assert main(["adapter", str(config(max_steps=4, save_steps=2, **values))]) == 2
        assert f"with other {what}" in capsys.readouterr().err


def test_patience_outlives_a_stop(config, tmp_path: Path) -> None:
    """It counts from before: a run that goes on ends where it would have ended."""
    values = {"max_steps": 9, "eval_steps": 1, "early_stopping_patience": 3, "save_total_limit": 9}
    path = config(**values, learning_rate=1e-9)  # nothing gets better
    manifest = tmp_path / "made" / "adapter" / "manifest.json"
    assert main(["adapter", str(path)]) == 0
    ended = json.loads(manifest.read_text())["steps"]
    assert 3 < ended < 8
    shutil.rmtree(tmp_path / "made" / "checkpoints" / f"checkpoint-{ended}")
    assert main(["adapter", str(path)]) == 0
    assert json.loads(manifest.read_text())["steps"] == ended


def test_a_card_has_prompts_from_all_over_the_rows(make, tmp_path: Path) -> None:
    for count, expected in ((8, [f"p{i}" for i in range(0, 96, 12)]), (200, None)):
        rows = [f"p{i}" for i in range(96)] * 2
        write_card(tmp_path, make(card_prompts=count), rows, 192, "0" * 64)
        prompts = json.loads((tmp_path / "routing_card.json").read_text())["prompts"]
        assert prompts == (expected or rows[:96])


def wrong_base(tmp_path: Path) -> dict[str, Any]:
    run = {"settings": "", "data": "", "base": "another"}
    checkpoint = tmp_path / "made" / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (tmp_path / "made" / RUN_FILE).write_text(json.dumps(run))
    return {}


def rows(*lines: object) -> Callable[[Path], dict[str, Any]]:
    def written(tmp_path: Path) -> dict[str, Any]:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return {"datasets": [{"path": file}]}

    return written


def text(content: str, name: str = "rows.jsonl") -> Callable[[Path], dict[str, Any]]:
    def written(tmp_path: Path) -> dict[str, Any]:
        (tmp_path / name).write_text(content)
        return {"datasets": [{"path": tmp_path / name}]}

    return written


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BROKEN: dict[str, tuple[Any, str]] = {
    "missing file": ({"datasets": [{"path": "nowhere.jsonl"}]}, "datasets"),
    "empty file": (text(""), "datasets"),
    "not json": (text("{oops\n"), "datasets"),
    "not utf-8": (lambda p: _bytes(p, b"\xff\xfe\xff"), "datasets"),
    "rows that are no objects": (rows([1, 2]), "datasets"),
    "no known columns": (rows({"a": 1}), "datasets"),
    "unknown role": (rows(chat(("narrator", "x"), ("assistant", "y"))), "datasets"),
    "no assistant turn": (rows(chat(("user", "x"))), "datasets"),
    "content that is no text": (rows({"messages": [{"role": "user", "content": 3}]}), "datasets"),
    "a sequence shorter than the prompt": ({"sequence_len": 8}, "sequence_len"),
    "all rows held out": ({"val_set_size": 1000}, "val_set_size"),
    "unknown key": ({"lora_rank": 8}, "lora_rank"),
    "a key of axolotl's": ({"deepspeed": "zero3.json"}, "deepspeed"),
    "a value of another type": ({"lora_r": "many"}, "lora_r"),
    "a value out of range": ({"learning_rate": -1}, "learning_rate"),
    "an unknown projection": ({"lora_target_modules": ["q_prj"]}, "lora_target_modules"),
    "unknown base": ({"base_model": "nobody/nothing-at-all"}, "base"),
    "a base without a model": (lambda p: {"base_model": _directory(p)}, "base"),
    "a run of another base": (wrong_base, "output_dir"),
    "an output that is a file": (lambda p: {"output_dir": _file(p)}, "output_dir"),
    "a loss that is no number": (lambda p: {"start_from": _diverged(p)}, "learning_rate"),
    "a start that is no adapter": ({"start_from": "nowhere"}, "start_from"),
    "preferences without a method": ({"rl": "ppo"}, "rl"),
}


def _bytes(tmp_path: Path, content: bytes) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_bytes(content)
    return {"datasets": [{"path": tmp_path / "rows.jsonl"}]}


def _diverged(tmp_path: Path) -> Path:
    """An adapter of the demo's base, one of whose numbers is none."""
    source = bundle_path() / "adapters" / "reverse"
    tensors = load_file(source / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = math.nan
    (tmp_path / "diverged").mkdir()
    save_file(tensors, tmp_path / "diverged" / "adapter_model.safetensors")
    config = (source / "adapter_config.json").read_text()
    (tmp_path / "diverged" / "adapter_config.json").write_text(config)
    return tmp_path / "diverged"


def _directory(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def _file(tmp_path: Path) -> Path:
    (tmp_path / "taken").write_text("")
    return tmp_path / "taken"


@pytest.mark.parametrize("what", list(BROKEN))
def test_what_is_broken_gets_one_clear_line(config, tmp_path: Path, capsys, what: str) -> None:
    """It names the field at fault, no path of the machine, and is no traceback."""
    values, field = BROKEN[what]
    made = values(tmp_path) if callable(values) else values
    assert main(["adapter", str(config(**made))]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert field in said[-1]
    assert str(tmp_path.parent) not in said[-1]
    assert not any("Traceback" in line for line in said)


def test_a_full_disk_is_said(config, tmp_path: Path) -> None:
    """Files of more than so many bytes fail to be written, as all do where no room is left."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
        "from router_training.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "adapter", str(config())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("output_dir: it cannot be written to (")
    assert "Traceback" not in done.stderr


def test_an_interrupt_saves_and_the_run_goes_on_to_the_bit(config, tmp_path: Path) -> None:
    values = {"max_steps": 12, "save_steps": 50, "logging_steps": 1, "name": "made"}
    assert main(["adapter", str(config(**values, output_dir=tmp_path / "whole"))]) == 0
    path = config(**values)
    command = [sys.executable, "-m", "router_training", "adapter", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        said = next(line for line in run.stderr if line.startswith("step 2/12"))
        run.send_signal(signal.SIGINT)
        said += run.stderr.read()
        assert run.wait() == 130
    assert "saving after this step" in said
    assert "Traceback" not in said
    saved = list((tmp_path / "made" / "checkpoints").glob("checkpoint-*"))
    assert len(saved) == 1
    assert 2 <= int(saved[0].name.rpartition("-")[2]) < 12
    assert main(["adapter", str(path)]) == 0
    files = [
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("made", "whole")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_what_the_check_refused_is_not_registered(config, tmp_path: Path, capsys) -> None:
    """Nor does the base's loss stand in the curve of the adapter's."""
    path = config(check={"margin": -10.0}, metrics=[], register_to="127.0.0.1:1")
    assert main(["run", str(path)]) == 1
    assert "REFUSED" in capsys.readouterr().out
    assert main(["register", str(path)]) == 2
    assert capsys.readouterr().err.startswith("check: the quality check refused 'made'")
    lines = (tmp_path / "made" / "metrics.jsonl").read_text().splitlines()
    held_out = [json.loads(line)["eval_loss"] for line in lines if "eval_loss" in line]
    assert not any("base_loss" in line for line in lines)
    metrics = json.loads((tmp_path / "made" / "adapter" / "manifest.json").read_text())["metrics"]
    assert held_out[-1] == pytest.approx(metrics["loss_after"], rel=1e-3)
    assert metrics["loss_before"] > metrics["loss_after"]
    again = config(check={"margin": 0.0}, metrics=[], register_to="127.0.0.1:1")
    assert main(["eval", str(again)]) == 0
    assert "passed" in capsys.readouterr().out


def test_a_server_that_is_not_there_costs_nothing_but_the_registration(
    config, tmp_path: Path, capsys
) -> None:
    path = config(metrics=[], register_to="127.0.0.1:1")
    assert main(["run", str(path)]) == 2
    assert "127.0.0.1:1" in capsys.readouterr().err
    directory = tmp_path / "made" / "adapter"
    assert json.loads((directory / "manifest.json").read_text())["metrics"]["passed"] is True
    assert (directory / "report.html").exists()


def test_the_doctor_knows_preferences(config, tmp_path: Path, capsys) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(lines(make_pairs(12), paired=True))
    path = config(rl="dpo", datasets=[{"path": file, "rows": 10}], val_set_size=2)
    assert main(["check", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows to learn from"], found["rows held out"]) == (8, 2)
    assert set(found["row"]) == {"prompt", "chosen", "rejected"}
    assert found["cut to sequence_len"] == 0
    assert main(["check", str(path), "--json", "--sequence_len", "8"]) == 0
    assert json.loads(capsys.readouterr().out)["cut to sequence_len"] == 16


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
        ({"liger_kernel": True}, "liger_kernel"),
        ({"report_to": ["wandb"]}, "report_to"),
    ],
)
def test_what_the_machine_lacks_is_said_before_the_run(
    config, tmp_path: Path, capsys, values: dict[str, Any], field: str
) -> None:
    if torch.cuda.is_available() or find_spec("wandb"):
        pytest.skip("this machine has it")
    assert main(["adapter", str(config(**values))]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{field}: ")
    assert not (tmp_path / "made").exists()


def test_a_start_of_another_base_is_refused_naming_both(config, tmp_path: Path, capsys) -> None:
    assert main(["adapter", str(config())]) == 0
    start = tmp_path / "made" / "adapter"
    again = config(start_from=start, output_dir=tmp_path / "again")
    assert main(["adapter", str(again)]) == 0
    card = json.loads((start / "routing_card.json").read_text())
    (start / "routing_card.json").write_text(json.dumps({**card, "base_fingerprint": "0" * 64}))
    other = config(start_from=start, output_dir=tmp_path / "other")
    capsys.readouterr()
    assert main(["adapter", str(other)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("start_from: ")
    assert "0" * 64 in said
    assert card["base_fingerprint"] in said


def test_an_example_is_written_to_start_from(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--example"]) == 0
    assert main(["check", "run.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["rows to learn from"], found["rows held out"]) == (336, 64)
    assert main(["init", "other.yaml", "--example"]) == 2
    assert "chats.jsonl is there already" in capsys.readouterr().err


def test_the_whole_way_with_a_server(config, tmp_path: Path, capsys) -> None:
    """Evaluated through a server of its own, checked, written on a page."""
    path = config(eval_rows=4, general_datasets=[{"path": tmp_path / "general.jsonl"}])
    write_chats(tmp_path / "general.jsonl", task_rows("reverse", 4))
    assert main(["run", str(path)]) == 0
    directory = tmp_path / "made" / "adapter"
    metrics = json.loads((directory / "manifest.json").read_text())["metrics"]
    assert set(metrics["before"]) == {"loss", "exact_match", "general"}
    page = (directory / "report.html").read_text()
    assert "Before and after" in page
    assert "data:image/svg+xml" in page
    assert "quality check" in capsys.readouterr().out
