"""Several adapters at once: the tokens, weights and schedule of TRL's trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import trainers
from benchmarks.tuning_rows import task_rows, write_chats
from mora_serve.errors import InvalidArgument
from router_training.batched import MixedRow
from router_training.batches import TokenRow
from router_training.tuning.encoding import IGNORED, Encoded
from router_training.tuning.run import train
from router_training.tuning.settings import LoraDrop
from router_training.tuning.together import schedule, shared, together, token_rows


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_each_run_of_learned_tokens_is_a_row_after_all_before_it(learned: list[bool]) -> None:
    ids = tuple(range(10, 10 + len(learned)))
    labels = tuple(i if yes else IGNORED for i, yes in zip(ids, learned, strict=True))
    rows = token_rows(Encoded(ids, labels, len(ids), end_added=False))
    assert [t for row in rows for t in row.answer] == [i for i in labels if i != IGNORED]
    for row in rows:
        start = ids.index(row.answer[0])
        assert row.prompt == ids[:start]
        assert row.answer == ids[start : start + len(row.answer)]
        assert start == 0 or not learned[start - 1]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_mean_over_rows_is_the_mean_over_tokens(lengths: list[int]) -> None:
    rows = [MixedRow(TokenRow((1,), (2,) * n), ((0, 1.0),)) for n in lengths]
    losses = torch.arange(1.0, len(rows) + 1)
    shares = torch.tensor([row.share for row in shared(rows)])
    tokens = torch.tensor([float(n) for n in lengths])
    assert torch.isclose((losses * shares).mean(), (losses * tokens).sum() / tokens.sum())


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedule_is_transformers(make, kind: str, warmup: int) -> None:
    from transformers import get_scheduler

    settings = make(lr_scheduler=kind, warmup_steps=warmup, warmup_ratio=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    ours = schedule(settings, 10)
    for step in range(10):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_names_are_those_of_the_datasets(make, chats: Path) -> None:
    assert together(make()) == ()
    two = [{"path": str(chats), "adapter": name} for name in ("b", "a")]
    assert together(make(datasets=two)) == ("a", "b")
    general = {"path": str(chats), "replay": True}
    assert together(make(datasets=[*two, general])) == ("a", "b")
    with pytest.raises(InvalidArgument, match=r"datasets.1.adapter: .* name the adapter"):
        together(make(datasets=[two[0], {"path": str(chats)}]))


@pytest.mark.parametrize(
    "value",
    [
        {"adalora": True},
        {"peft_use_dora": True},
        {"lora_drop": LoraDrop()},
        {"lora_dropout": 0.1},
        {"sample_packing": True},
    ],
)
def test_what_several_at_once_do_not_have_is_refused(make, chats: Path, value: dict) -> None:
    settings = make(datasets=[{"path": str(chats), "adapter": "a"}])
    import dataclasses

    with pytest.raises(InvalidArgument, match="several adapters at once") as caught:
        together(dataclasses.replace(settings, **value))
    assert caught.value.field == next(iter(value))


def test_its_losses_are_those_of_trl(make, tmp_path: Path) -> None:
    """Same start, batches, optimiser and schedule, in fp32 on the 4-bit base."""
    settings = make(val_set_size=0, optimizer="adamw_torch_fused", logging_steps=1, max_steps=5)
    both = trainers.both(tmp_path / "both", settings)
    assert len(both["trl"][0]) == len(both["batched"][0]) == 5
    assert both["batched"][0] == pytest.approx(both["trl"][0], rel=0.01)
    assert both["trl"][0][-1] < both["trl"][0][0]


def test_each_adapter_learns_its_own_rows(make, tmp_path: Path) -> None:
    datasets = [
        {
            "path": str(write_chats(tmp_path / f"{task}.jsonl", task_rows(task, 48))),
            "adapter": task,
        }
        for task in ("spell", "reverse")
    ]
    lines: list[str] = []
    trained = train(make(datasets=datasets, max_steps=12, learning_rate=4e-3), lines.append)
    assert set(trained.adapters) == {"spell", "reverse"}
    for name, directory in trained.adapters.items():
        losses = trained.metrics[name]
        assert losses["loss_after"] < 0.9 * losses["loss_before"]
        assert {f.name for f in directory.iterdir()} >= {
            "adapter_model.safetensors",
            "adapter_config.json",
            "manifest.json",
            "routing_card.json",
        }
