"""Rows split, weighed and counted: nothing that is asked is learned."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.tuning_rows import task_rows, write_chats
from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import read_base
from router_training.tuning.prepared import (
    Prepared,
    held_out_of,
    of_adapter,
    prepare,
    steps_of,
    times,
    weighted,
)
from router_training.tuning.settings import tune_settings

TOKENIZER = read_base("demo").tokenizer


def prepared(tmp_path: Path, **values: Any) -> Prepared:
    own = write_chats(tmp_path / "own.jsonl", task_rows("spell", 20))
    rows: dict[str, Any] = {"datasets": [{"path": str(own)}], "val_set_size": 5}
    return prepare(tune_settings({**rows, **values}), TOKENIZER)


def test_rows_that_are_held_out_are_not_learned_even_where_they_stand_twice(tmp_path: Path) -> None:
    chats = write_chats(tmp_path / "twice.jsonl", task_rows("spell", 20) * 2)
    found = prepared(tmp_path, datasets=[{"path": str(chats)}])
    assert (len(found.train), len(found.held_out)) == (30, 5)
    assert not {s.encoded.ids for s in found.train} & {s.encoded.ids for s in found.held_out}
    assert found.findings.duplicates == 15


def test_rows_that_are_asked_elsewhere_are_left_out_of_training(tmp_path: Path) -> None:
    asked = write_chats(tmp_path / "asked.jsonl", task_rows("spell", 20)[:4])
    for key in ("test_datasets", "general_datasets"):
        values = {key: [{"path": str(asked)}], "val_set_size": 0 if key == "test_datasets" else 5}
        found = prepared(tmp_path, **values)
        there = {s.encoded.ids for s in (*found.held_out, *found.general)}
        assert not {s.encoded.ids for s in found.train} & there
    whole = write_chats(tmp_path / "whole.jsonl", task_rows("spell", 20))
    with pytest.raises(InvalidArgument, match="every row is held out as well"):
        prepared(tmp_path, test_datasets=[{"path": str(whole)}])


def test_replay_is_learned_and_never_held_out(tmp_path: Path) -> None:
    own = write_chats(tmp_path / "own.jsonl", task_rows("spell", 20))
    general = write_chats(tmp_path / "general.jsonl", task_rows("reverse", 10))
    datasets = [{"path": str(own)}, {"path": str(general), "replay": True}]
    found = prepared(tmp_path, datasets=datasets)
    assert sum(s.replay for s in found.train) == 10
    assert not any(s.replay for s in found.held_out)


def test_equal_rows_of_two_adapters_are_held_out_of_each_apart(tmp_path: Path) -> None:
    own = write_chats(tmp_path / "own.jsonl", task_rows("spell", 20))
    datasets = [{"path": str(own), "adapter": name} for name in ("a", "b")]
    found = prepared(tmp_path, datasets=datasets, val_set_size=10)
    for name in ("a", "b"):
        learned = {s.encoded.ids for s in of_adapter(found.train, name)}
        asked = {s.encoded.ids for s in of_adapter(found.held_out, name)}
        assert len(learned) + len(asked) == 20
        assert not learned & asked


def test_what_one_adapter_is_asked_another_may_learn(tmp_path: Path) -> None:
    own = write_chats(tmp_path / "own.jsonl", task_rows("spell", 20))
    asked = write_chats(tmp_path / "asked.jsonl", task_rows("spell", 20)[:4])
    found = prepared(
        tmp_path,
        datasets=[{"path": str(own), "adapter": name} for name in ("a", "b")],
        test_datasets=[{"path": str(asked), "adapter": "a"}],
    )
    assert [len(of_adapter(found.train, name)) for name in ("a", "b")] == [16, 20]
    assert found.findings.in_both == 4


@given(st.floats(0.01, 20.0))
def test_a_weight_is_how_often_a_row_is_learned_on_average(weight: float) -> None:
    rng = random.Random(0)
    drawn = [times(weight, rng) for _ in range(2000)]
    assert set(drawn) <= {int(weight), int(weight) + 1}
    assert sum(drawn) / len(drawn) == pytest.approx(weight, abs=0.05)


def test_weights_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    own = write_chats(tmp_path / "own.jsonl", task_rows("spell", 20))
    thrice = prepared(tmp_path, datasets=[{"path": str(own), "weight": 3}])
    assert len(weighted(thrice.train, 0)) == 3 * len(thrice.train)
    found = prepared(tmp_path, datasets=[{"path": str(own), "weight": 0.001}])
    with pytest.raises(InvalidArgument, match="leave no row"):
        weighted(found.train, 0)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (0.001, 1), (0.25, 5), (3, 3)])
def test_what_is_held_out(size: float, count: int) -> None:
    settings = tune_settings({"datasets": [{"path": "x.jsonl"}], "val_set_size": size})
    assert len(held_out_of(range(20), settings, "rows")) == count


def test_all_may_not_be_held_out() -> None:
    settings = tune_settings({"datasets": [{"path": "x.jsonl"}], "val_set_size": 20})
    with pytest.raises(InvalidArgument, match="none is left to learn"):
        held_out_of(range(20), settings, "rows")


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "steps"), [(17, 16, 3, 6), (16, 16, 1, 1), (5, 16, 0.5, 1)]
)
def test_steps_are_those_of_transformers(rows: int, batch: int, epochs: float, steps: int) -> None:
    """A pass ends with a batch that is not full."""
    sizes = {"micro_batch_size": batch, "num_epochs": epochs}
    assert steps_of(tune_settings({"datasets": [{"path": "x.jsonl"}], **sizes}), rows) == steps
