"""A directory without an adapter: the reason, by the names in it alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mora_serve.adapters.validate import read_directory
from mora_serve.errors import InvalidArgument
from tests.adapters.make import LIMITS, SHAPE, config, directory, tensors

CASES: dict[str, tuple[list[str], str, str]] = {
    "nothing": ([], "MISSING_FILE", "PEFT's save_pretrained"),
    "a pickle": (["adapter_config.json", "adapter_model.bin"], "PICKLE", "safe_serialization"),
    "a pickle of another name": (["lora.PT"], "PICKLE", "safe_serialization"),
    "what training leaves": (
        ["training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt", "value_head.bin"],
        "MISSING_FILE",
        "PEFT's save_pretrained",
    ),
    "several files": (
        ["adapter_config.json", "adapter_model-00001-of-00002.safetensors"],
        "MISSING_FILE",
        "max_shard_size",
    ),
    "a merged model": (["config.json", "model.safetensors"], "MISSING_FILE", "whole model"),
    "a sharded model": (["model-00001-of-00002.safetensors"], "MISSING_FILE", "save_method='lora'"),
    "MLX": (["adapters.safetensors", "adapter_config.json"], "MISSING_FILE", "MLX"),
    "GGUF": (["lora-f16.gguf"], "MISSING_FILE", "GGUF"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_is_told_from_names_alone(tmp_path: Path, name: str) -> None:
    """Unopened: a pipe without a writer would make that wait for ever."""
    names, reason, why = CASES[name]
    (tmp_path / "adapter").mkdir()
    for file in names:
        os.mkfifo(tmp_path / "adapter" / file)
    if "adapter_config.json" in names:  # this one is read
        (tmp_path / "adapter" / "adapter_config.json").unlink()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidArgument) as e:
        read_directory(tmp_path, "adapter", SHAPE, LIMITS)
    assert (e.value.field, e.value.reason) == ("adapter_model.safetensors", reason)
    assert why in e.value.message
    assert str(tmp_path) not in e.value.message


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (["checkpoint-9", "checkpoint-10", "aaa"], "checkpoint-10"),
        (["train", "reference"], "reference"),
        (["pissa_backup", "pissa_converted", "pissa_init", "checkpoint-5"], "pissa_converted"),
    ],
)
def test_a_folder_that_holds_the_adapter_is_named(
    tmp_path: Path, folders: list[str], named: str
) -> None:
    for folder in folders:
        directory(tmp_path / "out" / folder, config(), tensors())
    with pytest.raises(InvalidArgument, match=f"in the folder '{named}'"):
        read_directory(tmp_path, "out", SHAPE, LIMITS)


def test_a_link_to_a_folder_is_not_looked_into(tmp_path: Path) -> None:
    directory(tmp_path / "outside", config(), tensors())
    (tmp_path / "root" / "out").mkdir(parents=True)
    (tmp_path / "root" / "out" / "checkpoint-1").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidArgument) as e:
        read_directory(tmp_path / "root", "out", SHAPE, LIMITS)
    assert "checkpoint-1" not in e.value.message
