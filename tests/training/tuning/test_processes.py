"""Two processes train as one with batches of twice the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks.tuning_rows import write_settings


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_two_processes_are_one_with_twice_the_batch(chats: Path, tmp_path: Path) -> None:
    made: dict[int, Path] = {}
    for count in (1, 2):
        values: dict[str, Any] = {
            "base_model": "demo",
            "datasets": [{"path": chats}],
            "output_dir": tmp_path / f"of-{count}",
            "name": "made",
            "micro_batch_size": 8 // count,
            "optimizer": "adamw_torch",
            "lora_r": 4,
            "max_steps": 5,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "val_set_size": 8,
        }
        config = write_settings(tmp_path / f"{count}.yaml", values)
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
        words = [sys.executable, *(launch if count == 2 else ()), "-m", "router_training"]
        done = subprocess.run(
            [*words, "adapter", str(config)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("made ") == 1
        made[count] = tmp_path / f"of-{count}"
    one, two = losses(made[1]), losses(made[2])
    assert len(one) == 5
    assert two == pytest.approx(one, rel=0.01)
    a, b = (load_file(d / "adapter" / "adapter_model.safetensors") for d in made.values())
    for key, tensor in a.items():
        # five steps of 1e-3 each, where AdamW makes as much of the least gradient's sign
        assert (tensor - b[key]).abs().mean() < 2e-4, key


def test_an_interrupt_of_one_stops_all_after_the_same_step(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch; from router_training.tuning.interrupts import Interrupts\n"
        "torch.distributed.init_process_group('gloo', init_method='file://' + sys.argv[1], "
        "rank=int(os.environ['RANK']), world_size=2)\n"
        "found = Interrupts(); print(found.agreed()); found.wished = os.environ['RANK'] == '1'\n"
        "print(found.agreed())"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "store")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [run.communicate(timeout=120)[0].split() for run in runs] == [["False", "True"]] * 2
