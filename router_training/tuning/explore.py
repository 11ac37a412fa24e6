"""What a run trains: the base as a whole, or with an adapter; LoRA-Drop decides how much of it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mora_serve.model.loading import BaseFiles
from router_training.tuning import drop, ranks, sft
from router_training.tuning.begin import padded, with_adapter
from router_training.tuning.model import load
from router_training.tuning.prepared import Prepared, steps_of, weighted
from router_training.tuning.recorder import Recorder
from router_training.tuning.settings import LoraDrop, TuneSettings
from router_training.tuning.stopped import run_digest


def trained_model(
    settings: TuneSettings, base: BaseFiles, prepared: Prepared, log: Callable[[str], None]
) -> Any:
    """The model that TRL's trainer gets. Where LoRA-Drop has not decided yet, it does first."""
    out = Path(settings.output_dir)
    if settings.adapter == "full":
        return load(settings, base.directory)
    steps = steps_of(settings, len(weighted(prepared.train, settings.seed)))

    def begun() -> Any:
        model = load(settings, base.directory)
        return with_adapter(settings, model, base.shape, steps, prepared.train, base.fingerprint)

    if settings.lora_drop is None:
        return begun()
    of = run_digest(settings, prepared.digest, base.fingerprint)
    decision = drop.Decision.read(out)
    if decision is None or decision.of != of:
        log(f"LoRA-Drop: {settings.lora_drop.steps} steps before the decision")
        found = _explore(settings, settings.lora_drop, begun(), base, prepared)
        decision = dataclasses.replace(found, of=of)
        if ranks.first():
            decision.write(out)
        gc.collect()  # the model that explored, before another is loaded
    kept = sum(map(len, decision.kept.values()))
    log(f"LoRA-Drop: {kept} modules keep an adapter of their own ({decision.share_kept:.0%})")
    return drop.reduced(load(settings, base.directory), decision, out / drop.EXPLORED)


def _explore(
    settings: TuneSettings, own: LoraDrop, model: Any, base: BaseFiles, prepared: Prepared
) -> drop.Decision:
    """Train briefly, measure, decide; what was learned so far is kept for going on."""
    out = Path(settings.output_dir)
    brief = dataclasses.replace(
        settings,
        max_steps=own.steps,
        lr_scheduler="constant_with_warmup",
        eval_steps=0,
        save_steps=0,
        load_best_model_at_end=False,
        early_stopping_patience=0,
    )
    alone = dataclasses.replace(prepared, held_out=())
    (out / drop.EXPLORED).mkdir(exist_ok=True)
    recorder = Recorder(out / drop.EXPLORED)
    trainer = sft.sft_trainer(
        brief, model, base.tokenizer.hf, alone, out / drop.EXPLORED, [recorder]
    )
    trainer.train()
    if recorder.interrupted:
        raise KeyboardInterrupt
    own_rows = [s for s in prepared.train if not s.replay]
    chosen = drop.sample_of([len(s.encoded.ids) for s in own_rows], own.sample, settings.seed)
    batches = padded([own_rows[i] for i in chosen], settings.micro_batch_size)
    decision = drop.decide(drop.measure(trainer.model, batches), own)
    if ranks.first():
        trainer.model.save_pretrained(str(out / drop.EXPLORED), save_embedding_layers=False)
    trainer.accelerator.wait_for_everyone()
    return decision
