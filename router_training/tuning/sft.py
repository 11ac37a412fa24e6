"""Supervised fine-tuning of one adapter: our settings as TRL's trainer takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from router_training.tuning import ranks
from router_training.tuning.model import compute_type, masters_in_fp32
from router_training.tuning.prepared import Prepared, Sample, weighted
from router_training.tuning.settings import TuneSettings
from router_training.tuning.stopped import CHECKPOINTS


def as_dataset(samples: Sequence[Sample]) -> Any:
    """What TRL's trainers take: ``input_ids`` and ``labels`` of each row."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [list(s.encoded.ids) for s in samples],
            "labels": [list(s.encoded.labels) for s in samples],
        }
    )


def arguments(settings: TuneSettings, out: Path, held_out: bool) -> dict[str, Any]:
    """What all of TRL's trainers are told alike."""
    s, cuda = settings, torch.cuda.is_available()
    optimizer: str = s.optimizer
    if optimizer == "auto":
        eight = "paged_adamw_8bit" if cuda else "adamw_8bit"
        optimizer = eight if s.adapter == "qlora" else "adamw_torch"
    evaluates, saves = s.eval_steps or s.save_steps, s.save_steps or s.eval_steps
    every = "steps" if evaluates else "epoch"
    return {
        "output_dir": str(out / CHECKPOINTS),
        "per_device_train_batch_size": s.micro_batch_size,
        "per_device_eval_batch_size": s.micro_batch_size,
        "gradient_accumulation_steps": s.gradient_accumulation_steps,
        "num_train_epochs": s.num_epochs,
        "max_steps": s.max_steps or -1,
        "learning_rate": s.learning_rate,
        "optim": optimizer,
        "lr_scheduler_type": s.lr_scheduler,
        "warmup_steps": s.warmup_steps or s.warmup_ratio,
        "weight_decay": s.weight_decay,
        "max_grad_norm": s.max_grad_norm,
        "bf16": compute_type(s) is torch.bfloat16,
        "gradient_checkpointing": s.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": s.logging_steps,
        "logging_first_step": True,
        "eval_strategy": every if held_out else "no",
        "eval_steps": evaluates or None,
        "save_strategy": every,
        **({"save_steps": saves} if saves else {}),
        "save_total_limit": s.save_total_limit,
        # AdaLoRA's checkpoints have other ranks than the model that would load them
        "load_best_model_at_end": held_out and s.load_best_model_at_end and not s.adalora,
        "restore_callback_states_from_checkpoint": True,
        "metric_for_best_model": "eval_loss" if held_out else None,
        "greater_is_better": False if held_out else None,
        "seed": s.seed,
        "data_seed": s.seed,
        "report_to": list(s.report_to) or "none",
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "ddp_backend": "gloo" if ranks.count() > 1 and not cuda else None,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": cuda,
        "use_liger_kernel": s.liger_kernel,
        "max_length": s.sequence_len,
    }


def stopping(settings: TuneSettings) -> list[Any]:
    """What ends a run whose held-out loss no longer falls, where the settings say so."""
    from transformers import EarlyStoppingCallback

    patience = settings.early_stopping_patience
    return [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []


def sft_trainer(
    settings: TuneSettings,
    model: Any,
    tokenizer: Any,
    prepared: Prepared,
    out: Path,
    callbacks: Sequence[Any] = (),
) -> Any:
    """TRL's trainer on the prepared rows, what is trained in fp32.

    ``model`` has its adapter already, or is trained as a whole; ``tokenizer`` is transformers'.
    """
    from datasets import disable_progress_bars
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    rows = weighted(prepared.train, settings.seed)
    held_out = as_dataset(prepared.held_out) if prepared.held_out else None
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments(settings, out, held_out is not None),
            packing=settings.sample_packing,
            eval_packing=False,
        ),
        train_dataset=as_dataset(rows),
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[*callbacks, *(stopping(settings) if held_out is not None else ())],
    )
    trainer.remove_callback(PrinterCallback)  # the recorder's lines say it
    masters_in_fp32(trainer.model)
    if settings.loraplus_lr_ratio:
        trainer.optimizer = _loraplus(settings, trainer)
    return trainer


def _loraplus(settings: TuneSettings, trainer: Any) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    return create_loraplus_optimizer(
        trainer.model,
        kind,
        **{**options, "lr": settings.learning_rate},
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        loraplus_weight_decay=settings.weight_decay,
    )
