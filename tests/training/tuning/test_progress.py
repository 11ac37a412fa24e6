"""A run of several adapters: it goes on to the bit, keeps each adapter's best, stops in time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tuning_rows import task_rows, write_chats
from mora_serve.model.loading import read_base
from mora_serve.model.stacked import StackedAdapters
from router_training.tuning.progress import Progress
from router_training.tuning.recorder import PlainRecorder
from router_training.tuning.run import train


def test_a_stopped_run_goes_on_to_the_bit(make, tmp_path: Path, monkeypatch) -> None:
    datasets = [
        {"path": str(write_chats(tmp_path / f"{task}.jsonl", task_rows(task, 24))), "adapter": task}
        for task in ("spell", "reverse")
    ]
    values: dict[str, Any] = {"datasets": datasets, "max_steps": 6, "save_steps": 2}
    files = []
    for name in ("whole", "stopped"):
        settings = make(**values, output_dir=str(tmp_path / name))
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(PlainRecorder, "step", _stopping_at(5))
                with pytest.raises(KeyboardInterrupt):
                    train(settings, lambda line: None)
        lines: list[str] = []
        trained = train(settings, lines.append)
        assert any("going on" in line for line in lines) == (name == "stopped")
        files.append([(d / "adapter_model.safetensors").read_bytes() for d in _paths(trained)])
    assert files[0] == files[1]
    assert files[0][0] != files[0][1]


def _paths(trained: Any) -> list[Path]:
    return [trained.adapters[name] for name in ("spell", "reverse")]


def _stopping_at(last: int) -> Any:
    whole = PlainRecorder.step

    def step(self: PlainRecorder, number: int, loss: float) -> None:
        if number == last:
            raise KeyboardInterrupt
        whole(self, number, loss)

    return step


def stack(value: float) -> StackedAdapters:
    adapters = StackedAdapters(read_base("demo").shape, 2, 2, 4.0).requires_grad_(False)
    for parameter in adapters.parameters():
        parameter.fill_(value)
    return adapters


class Held:
    """Held-out losses in turn."""

    def __init__(self, *losses: Mapping[int, float]) -> None:
        self.losses = list(losses)

    def __call__(self, adapters: StackedAdapters) -> Mapping[int, float]:
        return self.losses.pop(0)


def followed(progress: Progress, steps: int) -> tuple[StackedAdapters, int]:
    """Adapters whose numbers are the step's; the step that it ended with."""
    adapters = stack(0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for step in range(1, steps + 1):
        for parameter in adapters.parameters():
            parameter.fill_(float(step))
        if progress.after(step, adapters, optimizer, schedule):
            return adapters, step
    return adapters, steps


def of(adapters: StackedAdapters, index: int) -> set[float]:
    own = [p for key, p in adapters.a.items() if key.endswith(f"/{index}")]
    return {float(x) for p in own for x in p.unique()}


def test_each_adapter_is_kept_where_its_loss_was_least(tmp_path: Path) -> None:
    said: list[tuple[int, float]] = []
    held = Held({0: 3.0, 1: 3.0}, {0: 1.0, 1: 4.0}, {0: 2.0, 1: 2.0})
    progress = Progress(tmp_path / "c.pt", 2, held, lambda *pair: said.append(pair))
    adapters, last = followed(progress, 6)
    assert last == 6
    assert said == [(2, 3.0), (4, 2.5), (6, 2.0)]
    best = progress.best(adapters)
    assert (of(best, 0), of(best, 1)) == ({4.0}, {6.0})


def test_without_held_out_rows_or_if_told_so_the_last_is_kept(tmp_path: Path) -> None:
    for held, keep in ((Held({}, {}), True), (Held({0: 1.0}, {0: 2.0}), False)):
        progress = Progress(tmp_path / "c.pt", 1, held, lambda *_: None, best=keep)
        adapters, _ = followed(progress, 2)
        assert of(progress.best(adapters), 0) == {2.0}


def test_a_run_ends_once_no_adapter_gets_better(tmp_path: Path) -> None:
    held = Held({0: 2.0, 1: 2.0}, {0: 3.0, 1: 1.0}, {0: 3.0, 1: 1.0}, {0: 3.0, 1: 2.0})
    progress = Progress(tmp_path / "c.pt", 1, held, lambda *_: None, patience=2)
    _, last = followed(progress, 9)
    assert last == 4


def test_the_best_outlives_a_stop(tmp_path: Path) -> None:
    first = Progress(
        tmp_path / "c.pt", 1, Held({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0}), lambda *_: None
    )
    followed(first, 2)
    again = Progress(tmp_path / "c.pt", 1, Held(), lambda *_: None)
    adapters = stack(0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert again.begin(adapters, optimizer, schedule) == 2
    assert of(adapters, 0) == {2.0}
    assert of(again.best(adapters), 0) == {1.0}
