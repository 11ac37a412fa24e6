"""Weights move: lora_A after 20 steps at a learning rate of 2e-5 on a base in NF4.

Of TRL's trainer as it is, and of this project's, which keeps what is trained in 32 bits: the share
of lora_A's numbers that are the same as before.

    python -m benchmarks.masters --json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.tuning_rows import reported, task_rows, write_chats
from mora_serve.model.loading import read_base
from router_training.tuning import sft
from router_training.tuning.begin import with_adapter
from router_training.tuning.model import load
from router_training.tuning.prepared import prepare
from router_training.tuning.settings import TuneSettings, tune_settings


def main() -> None:
    """Measure, print, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-5)
    reported(measure, parser)


def measure(root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The shares of both."""
    chats = write_chats(root / "chats.jsonl", task_rows("spell", 200))
    settings = tune_settings(
        {
            "base_model": "demo",
            "datasets": [{"path": str(chats)}],
            "output_dir": str(root / "out"),
            "max_steps": args.steps,
            "learning_rate": args.lr,
            "warmup_ratio": 0.0,
            "val_set_size": 0,
        }
    )
    return {
        "unchanged": unchanged(settings, root / "ours"),
        "unchanged_trl": unchanged(settings, root / "trl", as_trl_has_it=True),
    }


def unchanged(settings: TuneSettings, out: Path, *, as_trl_has_it: bool = False) -> float:
    """The share of lora_A's numbers that training left as they were.

    TRL's trainer puts what is trained on a quantised base in bfloat16.
    """
    base = read_base(settings.base_model)
    prepared = prepare(settings, base.tokenizer)
    model: Any = load(settings, base.directory)
    torch.manual_seed(0)
    model = with_adapter(settings, model, base.shape, settings.max_steps, prepared.train)
    trainer = sft.sft_trainer(settings, model, base.tokenizer.hf, prepared, out)
    if as_trl_has_it:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()

    def numbers() -> torch.Tensor:
        named = trainer.model.named_parameters()
        return torch.cat([p.detach().flatten().clone() for n, p in named if "lora_A" in n])

    before = numbers()
    trainer.train()
    return float((numbers() == before).float().mean())


if __name__ == "__main__":
    main()
