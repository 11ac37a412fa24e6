"""The batched trainer with one adapter beside TRL's: the same losses, and steps as fast.

The demo's base in 4 bits, computed in fp32; both begin with the same adapter and get the same
batches in the same order, AdamW in 32 bits, the same schedule and clipping. TRL's trainer runs
first and its batches are taken down; then the batched one learns from them. Losses are compared
step by step, as a share of TRL's, or of 5 % of the first where TRL's is less; times are of whole
steps, each trainer alone, rounds taking turns.

    python -m benchmarks.trainers --json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks import report
from benchmarks.tuning_rows import task_rows, write_chats
from mora_serve.model.loading import read_base
from router_training.batched import MixedRow, train_on
from router_training.peft_files import load_peft
from router_training.tuning import sft
from router_training.tuning.begin import with_adapter
from router_training.tuning.encoding import Encoded
from router_training.tuning.model import load
from router_training.tuning.prepared import prepare, steps_of
from router_training.tuning.settings import TuneSettings, tune_settings
from router_training.tuning.together import (
    load_for,
    recipe_of,
    schedule,
    shared,
    token_mean,
    token_rows,
)

COLUMNS = "input_ids", "labels", "attention_mask"


class Noted(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    """Each step's loss and seconds."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The clock starts."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """And ends."""
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """A step's loss."""
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--task", default="spell")
    parser.add_argument("--rows", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args)
    report.log(
        f"largest difference of a step's loss {result['largest_difference']:.4f}, TRL's step "
        f"{result['trl_step_ms']:.1f} ms, the batched trainer's {result['batched_step_ms']:.1f} ms"
    )
    report.emit({**result, "arguments": vars(args), "environment": report.environment()})


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Losses of both, and the medians of their steps' times."""
    chats = write_chats(root / "chats.jsonl", task_rows(args.task, args.rows))
    settings = tune_settings(
        {
            "base_model": "demo",
            "datasets": [{"path": str(chats)}],
            "output_dir": str(root / "one"),
            "val_set_size": 0,
            "optimizer": "adamw_torch_fused",
            "micro_batch_size": args.batch,
            "num_epochs": args.epochs,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "load_best_model_at_end": False,
        }
    )
    rounds = [both(root / str(turn), settings) for turn in range(args.repeat)]
    losses, other = rounds[0]["trl"][0], rounds[0]["batched"][0]
    # A step's loss is compared where there still is one: near 0 a share says nothing.
    scale = [max(a, 0.05 * losses[0]) for a in losses]
    apart = [abs(a - b) / s for a, b, s in zip(losses, other, scale, strict=True)]
    times = {
        name: statistics.median(t for turn in rounds for t in turn[name][1][2:])
        for name in ("trl", "batched")
    }
    return {
        "largest_difference": max(apart),
        "trl_step_ms": 1e3 * times["trl"],
        "batched_step_ms": 1e3 * times["batched"],
        "step_ratio": times["batched"] / times["trl"],
        "losses": {"trl": losses, "batched": other},
    }


def both(root: Path, settings: TuneSettings) -> dict[str, tuple[list[float], list[float]]]:
    """(losses, seconds) a step of TRL's trainer, and of the batched one on the same batches."""
    root.mkdir()
    base = read_base(settings.base_model)
    prepared = prepare(settings, base.tokenizer)
    steps = steps_of(settings, len(prepared.train))
    torch.manual_seed(settings.seed)
    model = with_adapter(
        settings, load(settings, base.directory), base.shape, steps, prepared.train
    )
    model.save_pretrained(str(root / "start"))
    noted = Noted()
    trainer = sft.sft_trainer(settings, model, base.tokenizer.hf, prepared, root, [noted])
    seen: list[dict[str, Any]] = []  # turned into rows once nothing is timed
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        seen.append({key: value.clone() for key, value in inputs.items() if key in COLUMNS})
        return inner(model, inputs, *rest, **options)

    trainer.compute_loss = compute_loss
    trainer.train()
    del trainer, model
    losses: list[float] = []
    seconds: list[float] = []
    last = 0.0

    def note(_: int, loss: float) -> None:
        nonlocal last
        now = time.perf_counter()
        losses.append(loss)
        seconds.append(now - last)
        last = now

    decoder = load_for(settings)
    adapters = load_peft(base.shape, [root / "start"])
    last = time.perf_counter()
    train_on(
        decoder,
        adapters,
        in_order([rows_of(inputs) for inputs in seen]),
        recipe_of(settings, steps),
        note,
        losses=token_mean,
        schedule=schedule(settings, steps),
    )
    return {"trl": (noted.losses, noted.seconds), "batched": (losses, seconds)}


def rows_of(inputs: Any) -> list[Encoded]:
    """A collated batch's rows."""
    rows = []
    columns = (inputs[name] for name in COLUMNS)
    for ids, labels, mask in zip(*columns, strict=True):
        kept = mask.bool()
        own = tuple(ids[kept].tolist()), tuple(labels[kept].tolist())
        rows.append(Encoded(*own, len(own[0]), end_added=False))
    return rows


def in_order(seen: Sequence[Sequence[Encoded]]) -> Iterator[Sequence[MixedRow]]:
    """The same batches, as the batched trainer takes them."""
    for batch in seen:
        yield shared([MixedRow(t, ((0, 1.0),)) for e in batch for t in token_rows(e)])


if __name__ == "__main__":
    main()
