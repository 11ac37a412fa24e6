"""The memory plan: against what a model keeps, and by what changes it is made to fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory
from mora_serve.model.files import read_shape
from mora_serve.model.footprint import GIB
from router_training.tuning.begin import with_adapter
from router_training.tuning.model import load
from router_training.tuning.planner import cheaper, plan
from router_training.tuning.settings import tune_settings

ROWS, LENGTH = 2, 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    memory.write_model(folder, memory.llama_config(256, 640, 3, 320))
    return folder


def settings(base: Path | str, **values: Any) -> Any:
    sizes = {"micro_batch_size": ROWS, "sequence_len": LENGTH, "lora_r": 1}
    rows = {"datasets": [{"path": "rows.jsonl"}], "base_model": str(base)}
    return tune_settings({**rows, **sizes, **values})


def test_what_layers_keep_is_what_autograd_keeps(base: Path) -> None:
    own = settings(base)
    shape = read_shape(str(base))
    model = with_adapter(own, load(own, base), shape, 1, ())
    kept: dict[int, int] = {}
    of_model = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    layers = model.get_base_model().model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layers(torch.zeros(ROWS, LENGTH, dtype=torch.long))
    assert out.last_hidden_state.requires_grad
    planned = plan(own, shape, cuda=False).parts["activations of all layers"]
    assert planned == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize("targets", [["q_proj"], ["gate_proj", "down_proj"]])
def test_the_adapter_is_counted_as_it_is_made(base: Path, targets: list[str]) -> None:
    own = settings(base, lora_r=4, lora_target_modules=targets)
    shape = read_shape(str(base))
    model = with_adapter(own, load(own, base), shape, 1, ())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert shape.adapter_parameters(4, targets) == trained


def test_the_first_change_that_suffices_is_named(base: Path) -> None:
    own = settings(base, adapter="lora", micro_batch_size=64, sequence_len=4096)
    shape = read_shape(str(base))
    whole = plan(own, shape).total
    assert cheaper(own, shape, whole) is not None
    said, found = cheaper(own, shape, 0.9 * whole) or ("", None)
    assert said.startswith("adapter: qlora")
    assert found is not None
    assert found.total <= 0.9 * whole
    assert cheaper(own, shape, 1e6) is None


def test_published_sizes_of_a_large_base(base: Path, tmp_path: Path) -> None:
    """Weights of the 8B and 70B shapes in NF4 with double quantisation, the tables beside."""
    for name, sizes, least, most in (
        ("8b", (4096, 14336, 32, 128256), 5.0, 6.0),
        ("70b", (8192, 28672, 80, 128256), 36.0, 38.0),
    ):
        hidden, inner, layers, vocabulary = sizes
        config = {
            **memory.llama_config(hidden, inner, layers, vocabulary),
            "num_attention_heads": hidden // 128,
            "num_key_value_heads": 8,
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        parts = plan(
            settings(tmp_path / name, bnb_4bit_use_double_quant=True),
            read_shape(str(tmp_path / name)),
        ).parts
        weights = parts["linear weights"] + parts["embedding, head, norms"]
        assert least < weights / GIB < most
