"""A run from settings to an adapter's directory: prepared, trained, saved, with its manifest."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from mora_serve.model.loading import BaseFiles, read_base
from router_training.output import writable
from router_training.trainable import check_trainable
from router_training.tuning import ranks, sft
from router_training.tuning.adalora import Budget, regularised, save_as_lora
from router_training.tuning.begin import with_adapter
from router_training.tuning.explore import trained_model
from router_training.tuning.machine import check_machine
from router_training.tuning.model import load
from router_training.tuning.preferences import preference_trainer, read_preferences
from router_training.tuning.prepared import (
    Prepared,
    prepare,
    rows_a_step,
    steps_of,
    weighted,
)
from router_training.tuning.recorder import Recorder, memory_bytes, peak_bytes
from router_training.tuning.results import Facts, write_card, write_manifest
from router_training.tuning.settings import TuneSettings, adapter_name
from router_training.tuning.several import train_several
from router_training.tuning.stopped import last_checkpoint
from router_training.tuning.together import together

ADAPTER = "adapter"

Log = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """Where the adapters are by name, and their losses; ``prepared`` is None of preferences."""

    adapters: Mapping[str, Path]
    base: BaseFiles
    prepared: Prepared | None
    metrics: Mapping[str, Mapping[str, float]]
    finished: bool


def train(settings: TuneSettings, log: Log) -> Trained:
    """Train what the settings say: one adapter on rows or preferences, or several at once.

    A run that was stopped goes on. Raises InvalidArgument for what is wrong with data or settings,
    and where the output directory has a run of other ones.
    """
    check_machine(settings)
    check_trainable(settings.base_model, "base_model")
    writable(Path(settings.output_dir), "output_dir")
    names = together(settings)
    set_seed(settings.seed)  # before the trainer does: of how an adapter begins
    if settings.rl is not None:
        return _prefer(settings, log)
    base = read_base(settings.base_model)
    log("reading the rows")
    prepared = prepare(settings, base.tokenizer)
    log(f"{len(prepared.train)} rows to learn from, {len(prepared.held_out)} held out")
    if names:
        found = train_several(settings, names, base, prepared, log)
        return Trained(found[0], base, prepared, found[1], found[2])
    return _one(settings, base, prepared, log)


def _one(settings: TuneSettings, base: BaseFiles, prepared: Prepared, log: Log) -> Trained:
    checkpoint = last_checkpoint(settings, prepared.digest, base.fingerprint)
    if settings.adalora and checkpoint is not None:
        log("AdaLoRA's checkpoints cannot be gone on from: beginning anew")
        checkpoint = None
    rows = weighted(prepared.train, settings.seed)
    tokens = sum(len(s.encoded.ids) for s in rows) / len(rows)
    recorder = Recorder(Path(settings.output_dir), tokens * rows_a_step(settings))
    importlib.import_module("trl")  # libraries are not what the run takes
    held = memory_bytes()
    model = trained_model(settings, base, prepared, log)
    callbacks = [recorder, *([Budget()] if settings.adalora else [])]
    trainer = sft.sft_trainer(
        settings, model, base.tokenizer.hf, prepared, Path(settings.output_dir), callbacks
    )
    if settings.adalora:
        regularised(trainer)
    _train(trainer, checkpoint, log)
    metrics: dict[str, float] = {"peak_bytes": peak_bytes() - held}
    if prepared.held_out:
        metrics["loss_after"] = float(trainer.evaluate()["eval_loss"])
        metrics["loss_before"] = _base_loss(settings, trainer, base, prepared)
    prompts = [s.example.prompt for s in prepared.train if not s.replay]
    counts = {"train": len(prepared.train), "held_out": len(prepared.held_out)}
    directory = _finish(settings, trainer, base, prepared.digest, prompts, counts, metrics)
    name = adapter_name(settings)
    return Trained({name: directory}, base, prepared, {name: metrics}, not recorder.interrupted)


def _prefer(settings: TuneSettings, log: Log) -> Trained:
    base = read_base(settings.base_model)
    log("reading the rows")
    rows = read_preferences(settings, base.tokenizer)
    log(f"{len(rows.train)} rows to learn from, {len(rows.held_out)} held out")
    checkpoint = last_checkpoint(settings, rows.digest, base.fingerprint)
    out = Path(settings.output_dir)
    recorder = Recorder(out)
    model = load(settings, base.directory)
    if settings.adapter != "full":
        steps = steps_of(settings, len(rows.train))
        model = with_adapter(settings, model, base.shape, steps, (), base.fingerprint)
    trainer = preference_trainer(settings, model, base.tokenizer.hf, rows, out, [recorder])
    _train(trainer, checkpoint, log)
    metrics: dict[str, float] = {}
    if rows.held_out:
        found = trainer.evaluate()
        kept = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
        metrics = {key.removeprefix("eval_"): found[key] for key in kept if key in found}
    prompts = [str(row["prompt"]) for row in rows.asked]
    counts = {"train": len(rows.train), "held_out": len(rows.held_out)}
    directory = _finish(settings, trainer, base, rows.digest, prompts, counts, metrics)
    name = adapter_name(settings)
    return Trained({name: directory}, base, None, {name: metrics}, not recorder.interrupted)


def _train(trainer: Any, checkpoint: Path | None, log: Log) -> None:
    if checkpoint is not None:
        log(f"going on from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _finish(
    settings: TuneSettings,
    trainer: Any,
    base: BaseFiles,
    digest: str,
    prompts: Sequence[str],
    counts: Mapping[str, int],
    metrics: Mapping[str, float],
) -> Path:
    """Save what was trained, with its card and manifest; the directory."""
    directory = Path(settings.output_dir) / ADAPTER
    if not ranks.first():
        return directory
    model = trainer.model
    if settings.adapter == "full":
        model.save_pretrained(str(directory))
        base.tokenizer.hf.save_pretrained(str(directory))
    else:
        config = model.peft_config["default"]
        config.base_model_name_or_path = settings.base_model  # not where it lies on this machine
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        if settings.adalora:
            save_as_lora(model, directory)
        else:
            # without a look at the hub for the base's vocabulary, which stays as it is
            # (DPO's trainer has a second adapter, for its reference)
            model.save_pretrained(
                str(directory), save_embedding_layers=False, selected_adapters=["default"]
            )
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's, with nothing filled in
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = Facts(adapter_name(settings), base, digest, trainer.state.global_step, trained)
    write_card(directory, settings, prompts, counts["train"], base.fingerprint)
    write_manifest(directory, settings, facts, counts, metrics)
    return directory


def _base_loss(settings: TuneSettings, trainer: Any, base: BaseFiles, prepared: Prepared) -> float:
    """Mean loss a learned token of the held-out rows, of the base alone.

    Measured after training: a model that accelerate has prepared for evaluation is not wrapped for
    several processes any more, and each would train on its own.
    """
    if settings.adapter != "full":
        return _without_adapter(trainer)
    model = load(settings, base.directory)
    out = Path(settings.output_dir)
    alone = sft.sft_trainer(settings, model, base.tokenizer.hf, prepared, out)
    return float(alone.evaluate()["eval_loss"])


def held_out_loss(
    settings: TuneSettings, base: BaseFiles, prepared: Prepared, directory: Path
) -> tuple[float, float]:
    """Mean loss a learned token of the held-out rows, of the base and of what a directory has."""
    from peft import PeftModel

    def trainer_of(model: Any) -> Any:
        out = Path(settings.output_dir)
        return sft.sft_trainer(settings, model, base.tokenizer.hf, prepared, out)

    if settings.adapter == "full":
        models = (load(settings, place) for place in (base.directory, directory))
        before, after = (float(trainer_of(m).evaluate()["eval_loss"]) for m in models)
        return before, after
    model = PeftModel.from_pretrained(
        load(settings, base.directory), str(directory), is_trainable=True
    )
    trainer = trainer_of(model)
    after = float(trainer.evaluate()["eval_loss"])
    return _without_adapter(trainer), after


def _without_adapter(trainer: Any) -> float:
    with trainer.model.disable_adapter():
        return float(trainer.evaluate(metric_key_prefix="base")["base_loss"])
