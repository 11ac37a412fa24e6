"""LoRA-Drop: which layers are kept, and what is left of the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from mora_serve.model.loading import read_base
from router_training.tuning import drop
from router_training.tuning.begin import padded, with_adapter
from router_training.tuning.model import load
from router_training.tuning.prepared import prepare
from router_training.tuning.run import train
from router_training.tuning.settings import LoraDrop


@given(
    # a library that torch loads may have switched subnormal numbers off
    st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8),
    st.floats(0, 1, allow_subnormal=False),
)
def test_the_most_important_layers_are_kept_until_they_hold_the_threshold(
    values: list[float], threshold: float
) -> None:
    sums = {("q_proj", layer): value for layer, value in enumerate(values)}
    decision = drop.decide(sums, LoraDrop(threshold=threshold))
    kept, importance = decision.kept["q_proj"], decision.importance["q_proj"]
    assert kept
    held = sum(importance[i] for i in kept)
    others = [importance[i] for i in range(len(values)) if i not in kept]
    assert all(importance[i] >= max(others, default=0) for i in kept)
    if others:
        assert held >= threshold - 1e-9
        assert held - min(importance[i] for i in kept) < threshold + 1e-9 or len(kept) == 1


def test_each_projection_decides_for_itself() -> None:
    sums = {("q_proj", 0): 1.0, ("q_proj", 1): 9.5, ("up_proj", 0): 100.0, ("up_proj", 1): 0.0}
    decision = drop.decide(sums, LoraDrop(threshold=0.9))
    assert decision.kept == {"q_proj": [1], "up_proj": [0]}
    assert decision.share_kept == 0.5


def test_padding_does_not_count(make) -> None:
    """The same rows one by one, and side by side with others that are longer."""
    base = read_base("demo")
    settings = make()
    prepared = prepare(settings, base.tokenizer)
    model = with_adapter(settings, load(settings, base.directory), base.shape, 1, ())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    rows = sorted(prepared.train, key=lambda s: len(s.encoded.ids))
    rows = [*rows[:3], *rows[-3:]]
    assert len(rows[0].encoded.ids) < len(rows[-1].encoded.ids)
    apart, together = (drop.measure(model, padded(rows, size)) for size in (1, 6))
    assert together == pytest.approx(apart, rel=1e-3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_the_sample_is_of_all_lengths(lengths: list[int], share: float) -> None:
    chosen = drop.sample_of(lengths, share, 0)
    size = max(1, round(share * len(lengths)))
    assert len(set(chosen)) == len(chosen) == size
    ranked = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    places = sorted(ranked.index(i) for i in chosen)
    for i, place in enumerate(places):
        assert len(lengths) * i // size <= place < len(lengths) * (i + 1) // size


def test_another_runs_decision_is_not_taken(make, tmp_path: Path) -> None:
    lines: list[str] = []
    train(make(lora_drop={"steps": 2, "threshold": 0.5}, max_steps=1, save_steps=9), lines.append)
    shutil.rmtree(tmp_path / "made" / "checkpoints")  # as if it had been stopped before the first
    train(make(lora_drop={"steps": 2, "threshold": 0.6}, max_steps=1, save_steps=9), lines.append)
    assert sum("steps before the decision" in line for line in lines) == 2
    decision = drop.Decision.read(tmp_path / "made")
    assert decision is not None
    assert decision.threshold == 0.6


@pytest.mark.parametrize("mode", ["drop", "share"])
def test_a_run_with_fewer_adapters(make, tmp_path: Path, mode: str) -> None:
    """Fewer parameters are trained; dropped ones are not in the file, shared ones are equal."""
    settings = make(lora_drop={"mode": mode, "steps": 2, "threshold": 0.5}, max_steps=2)
    trained = train(settings, lambda line: None)
    directory = trained.adapters["made"]
    decision = drop.Decision.read(tmp_path / "made")
    assert decision is not None
    assert decision.share_kept < 1
    tensors = load_file(directory / "adapter_model.safetensors")
    projection, layers = "q_proj", decision.kept["q_proj"]
    others = [i for i in range(len(decision.importance[projection])) if i not in layers]
    found = [k for k in tensors if f".{projection}.lora_A" in k]
    if mode == "drop":
        assert len(found) == len(layers)
    else:
        shared = [k for k in found if any(f".layers.{i}." in k for i in others)]
        assert len(shared) == len(others)
        assert all((tensors[k] == tensors[shared[0]]).all() for k in shared)
    manifest = json.loads((directory / "manifest.json").read_text())
    whole = train(make(output_dir=str(tmp_path / "whole"), max_steps=1), lambda line: None)
    every = json.loads((whole.adapters["whole"] / "manifest.json").read_text())
    assert manifest["trained_parameters"] < every["trained_parameters"]
