"""A run's YAML file: Axolotl's names, every mistake named, every key from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mora_serve.errors import InvalidArgument
from router_training.tuning.settings import (
    ALIASES,
    ELSEWHERE,
    Dataset,
    LoraDrop,
    TuneSettings,
    adapter_name,
    checkable,
    four_bit,
    read_tune_settings,
    tune_settings,
)

DATA = "datasets: [{path: chats.jsonl}]\n"


def read(tmp_path: Path, text: str, *overrides: str) -> TuneSettings:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return read_tune_settings(file, overrides)


def test_a_file_as_axolotl_has_it(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        """
        base_model: ./base
        adapter: lora
        lora_r: 8
        lora_target_linear: true
        lora_rank_pattern: {q_proj: 4}
        datasets:
          - path: a.jsonl
            type: alpaca
            weight: 2
          - path: b.jsonl
            replay: true
        learning_rate: 2e-5
        flash_attention: true
        bf16: auto
        lora_drop: {mode: share}
        output_dir: ./out/pirate
        """,
    )
    assert settings.datasets == (
        Dataset("a.jsonl", "alpaca", weight=2.0),
        Dataset("b.jsonl", replay=True),
    )
    assert settings.learning_rate == 2e-5
    assert settings.lora_rank_pattern == {"q_proj": 4}
    assert settings.attn_implementation == "flash_attention_2"
    assert settings.lora_drop == LoraDrop("share")
    assert adapter_name(settings) == "pirate"
    assert not four_bit(settings)


def test_every_key_can_be_given_on_the_command_line(tmp_path: Path) -> None:
    """Whole numbers, texts, keys of a list's items and of a table that is not in the file."""
    words = ["--lora-r", "4", "--datasets.0.path=b.jsonl", "--check.metric", "f1"]
    words += ["--metrics", "[f1, bleu]", "--learning_rate=1e-3"]
    settings = read(tmp_path, DATA + "lora_r: 8\n", *words)
    assert settings.lora_r == 4
    assert settings.datasets == (Dataset("b.jsonl"),)
    assert settings.check.metric == "f1"
    assert settings.metrics == ("f1", "bleu")
    assert settings.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank: 8\n" + DATA, "lora_rank: this key is not known; did you mean 'lora_r"),
        ("datasets: [{file: a}]", "datasets.0.file: this key is not known; known are path, type"),
        ("datasets: [{type: alpaca}]", "datasets.0.path: it is missing"),
        ("datasets: [{path: a, type: alpacca}]", "datasets.0.type: 'alpacca' is not one of auto,"),
        ("datasets: []", "datasets: there are none"),
        ("lora_r: 8", "datasets: it is missing"),
        ("datasets: [{path: a, replay: true}]", "datasets: all are replay"),
        ("datasets: [{path: a, weight: 0}]", "datasets.0.weight: 0.0 is not above 0"),
        ("deepspeed: x.json\n" + DATA, "deepspeed: mora-serve does not have this key: start the"),
        ("adapter: qlora\nload_in_4bit: false\n" + DATA, "load_in_4bit: qlora is on a 4-bit base"),
        ("adapter: full\nload_in_4bit: true\n" + DATA, "load_in_4bit: 4-bit weights cannot"),
        ("adapter: pissa\n" + DATA, "adapter: 'pissa' is not one of lora, qlora, full"),
        ("lora_r: 0\n" + DATA, "lora_r: 0 is not between 1 and 1024"),
        ("learning_rate: fast\n" + DATA, "learning_rate: 'fast' is not a number"),
        ("learning_rate: nan\n" + DATA, "learning_rate: nan is not between"),
        ("lora_target_modules: [q_projj]\n" + DATA, "lora_target_modules: 'q_projj' is not a"),
        ("lora_target_linear: false\n" + DATA, "lora_target_modules: there are none"),
        ("metrics: [rouge]\n" + DATA, "metrics: 'rouge' is not one of exact_match"),
        ("report_to: [comet]\n" + DATA, "report_to: 'comet' is not one of tensorboard"),
        ("adalora: true\npeft_use_dora: true\n" + DATA, "peft_use_dora: AdaLoRA moves ranks"),
        ("lora_drop: {threshold: 2}\n" + DATA, "threshold: 2.0 is not between 0 and 1"),
        ("lora_drop: yes\n" + DATA, "lora_drop: True does not map keys"),
        ("output_dir: ./My Adapter\n" + DATA, "name: 'My Adapter' is not a valid name"),
        ("chat_template: llama3\n" + DATA, "chat_template: 'llama3' is neither"),
        ("use_dora: true\npeft_use_dora: true\n" + DATA, "peft_use_dora: it is given twice"),
    ],
)
def test_every_mistake_is_named_with_its_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        read(tmp_path, text)
    assert error.value.message.startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_r"], "lora_r: it has no value"),
        (["lora_r", "8"], "lora_r: it is neither a key nor its value"),
        (["--lorar=8"], "lorar: this key is not known; did you mean 'lora_r'"),
        (["--datasets.3.path=a"], "datasets.3.path: there is no"),
        (["--lora_r={"], "lora_r: '{' is not a YAML value"),
    ],
)
def test_mistakes_on_the_command_line_too(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        read(tmp_path, DATA, *words)
    assert error.value.message.startswith(message)


def test_tables_of_names_name_real_keys() -> None:
    """An alias leads to a key that there is; none of the others is one."""
    own = set(TuneSettings.__dataclass_fields__)
    assert set(ALIASES.values()) <= own
    assert not set(ELSEWHERE) & own
    assert not set(ALIASES) & own
    assert tune_settings({"datasets": {"path": "a"}}).datasets == (Dataset("a"),)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"adalora": True, "peft_use_dora": True}, "peft_use_dora"),
        ({"adalora": True, "sample_packing": True}, "sample_packing"),
        ({"adalora": True, "start_from": "x"}, "start_from"),
        ({"adapter": "full", "register_to": "a:1"}, "register_to"),
        ({"adapter": "full", "lora_drop": {}}, "lora_drop"),
        ({"rl": "dpo", "lora_drop": {}}, "lora_drop"),
        ({"rl": "kto", "micro_batch_size": 1}, "micro_batch_size"),
        ({"rl": "dpo", "datasets": [{"path": "x", "adapter": "a"}]}, "datasets.0.adapter"),
        ({"lora_drop": {}, "peft_use_dora": True}, "lora_drop"),
        ({"val_set_size": 0, "early_stopping_patience": 2}, "early_stopping_patience"),
        ({"eval_steps": 4, "save_steps": 6}, "save_steps"),
        ({"datasets": [{"path": "x", "roles": {}}]}, "datasets.0.roles"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model"),
    ],
)
def test_what_would_be_ignored_or_fail_late_is_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tune_settings({"datasets": [{"path": "chats.jsonl"}], **values})
    assert caught.value.field == key


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"check": {"metric": "f1"}}, "check.metric"),
        ({"val_set_size": 0}, "check.metric"),
        ({"check": {"metric": "exact_match"}, "eval_rows": 0}, "eval_rows"),
        ({"rl": "dpo"}, "rl"),
    ],
)
def test_a_check_of_what_is_not_measured_is_refused(values: dict[str, Any], key: str) -> None:
    rows = {"datasets": [{"path": "chats.jsonl"}]}
    checkable(tune_settings(rows))
    checkable(tune_settings({**rows, "val_set_size": 0, "check": {"metric": "none"}}))
    with pytest.raises(InvalidArgument) as caught:
        checkable(tune_settings({**rows, **values}))
    assert caught.value.field == key
