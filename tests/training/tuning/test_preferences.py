"""Preferences: rows that are wrong are named, and each method moves the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from benchmarks.preferred import lines, make_pairs
from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import read_base
from router_training.tuning.begin import with_adapter
from router_training.tuning.model import load
from router_training.tuning.preferences import preference_trainer, read_preferences
from router_training.tuning.run import train


def written(tmp_path: Path, *rows: dict[str, Any]) -> list[dict[str, str]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(file)}]


@pytest.mark.parametrize(
    ("method", "row", "what"),
    [
        ("dpo", {"prompt": "a", "chosen": "b"}, "it has no rejected"),
        ("dpo", {"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen is not a text"),
        ("orpo", {"prompt": "", "chosen": "b", "rejected": "c"}, "prompt is not a text"),
        ("kto", {"prompt": "a", "completion": "b"}, "it has no label"),
        ("kto", {"prompt": "a", "completion": "b", "label": 1}, "label is neither true nor false"),
    ],
)
def test_a_row_that_is_wrong_is_named(
    make, tmp_path: Path, method: str, row: dict[str, Any], what: str
) -> None:
    settings = make(rl=method, datasets=written(tmp_path, row))
    with pytest.raises(InvalidArgument, match=what) as caught:
        read_preferences(settings, read_base("demo").tokenizer)
    assert caught.value.field == "datasets"
    assert "row 1" in caught.value.message or "line 1" in caught.value.message


def test_prompts_are_rendered_as_the_server_sends_them(make, tmp_path: Path) -> None:
    tokenizer = read_base("demo").tokenizer
    rows = [{"prompt": f"p{i}", "chosen": "b", "rejected": "c"} for i in range(4)]
    found = read_preferences(
        make(rl="dpo", datasets=written(tmp_path, *rows), val_set_size=1), tokenizer
    )
    assert len(found.held_out) == 1
    assert len(found.train) == len(found.asked) == 3
    chatml = make(
        rl="dpo", datasets=written(tmp_path, *rows), chat_template="chatml", val_set_size=1
    )
    assert read_preferences(chatml, tokenizer).train[0]["prompt"].startswith("<|im_start|>user\np")
    for row, asked in zip(found.train, found.asked, strict=True):
        assert row["prompt"] == tokenizer.render([("user", asked["prompt"])])


def test_no_prompt_is_both_learned_and_held_out(make, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(make_pairs(20), paired=False))
    tokenizer = read_base("demo").tokenizer
    found = read_preferences(
        make(rl="kto", datasets=[{"path": str(file)}], val_set_size=0.2), tokenizer
    )
    assert (len(found.train), len(found.held_out)) == (32, 8)
    assert not {r["prompt"] for r in found.train} & {r["prompt"] for r in found.held_out}
    apart = make(rl="kto", datasets=[{"path": str(file)}], test_datasets=[{"path": str(file)}])
    with pytest.raises(InvalidArgument, match="every prompt is held out"):
        read_preferences(apart, tokenizer)


def test_weights_count(make, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(make_pairs(6), paired=True))
    settings = make(rl="dpo", datasets=[{"path": str(file), "weight": 3}], val_set_size=0)
    assert len(read_preferences(settings, read_base("demo").tokenizer).train) == 18


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo"])
def test_tokens_are_those_of_the_server(make, tmp_path: Path, method: str) -> None:
    """TRL's tokenisation adds nothing to a rendered prompt, and an end to an answer."""
    base = read_base("demo")
    file = tmp_path / "rows.jsonl"
    pairs = make_pairs(4)
    file.write_text(lines(pairs, paired=method != "kto"))
    settings = make(rl=method, datasets=[{"path": str(file)}], val_set_size=0)
    rows = read_preferences(settings, base.tokenizer)
    model = with_adapter(settings, load(settings, base.directory), base.shape, 1, ())
    trainer = preference_trainer(settings, model, base.tokenizer.hf, rows, tmp_path)
    asked, answer, _ = pairs[0]
    prompt = base.tokenizer.plain(base.tokenizer.render([("user", asked)]))
    row = trainer.train_dataset[0]
    completion = {"kto": "completion_ids", "dpo": "chosen_ids"}.get(method, "chosen_labels")
    found = [token for token in row[completion] if token != -100]
    assert row.get("prompt_ids", row.get("prompt_input_ids")) == prompt
    assert found == [*base.tokenizer.plain(answer), base.tokenizer.end_id]


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_a_few_steps_of_each_method_move_the_adapter(make, tmp_path: Path, method: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines(make_pairs(24), paired=method != "kto"))
    settings = make(
        rl=method, datasets=[{"path": str(file)}], max_steps=2, val_set_size=4, warmup_ratio=0.0
    )
    trained = train(settings, lambda line: None)
    tensors = load_file(trained.adapters["made"] / "adapter_model.safetensors")
    assert not (trained.adapters["made"] / "ref").exists()
    moved = [t for key, t in tensors.items() if "lora_B" in key]
    assert moved
    assert all(t.abs().max() > 0 for t in moved)
