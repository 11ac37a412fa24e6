"""Rows of a demo task, and settings of a run on the demo's base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tuning_rows import task_rows, write_chats
from router_training.tuning.settings import TuneSettings, tune_settings

Make = Callable[..., TuneSettings]


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("rows") / "chats.jsonl", task_rows("spell", 64))


@pytest.fixture
def make(chats: Path, tmp_path: Path) -> Make:
    """Settings of a run of a few steps, with others over them."""

    def settings(**values: Any) -> TuneSettings:
        return tune_settings(
            {
                "base_model": "demo",
                "datasets": [{"path": str(chats)}],
                "output_dir": str(tmp_path / "made"),
                "lora_r": 4,
                "val_set_size": 8,
                "max_steps": 4,
                "learning_rate": 1e-3,
                **values,
            }
        )

    return settings
