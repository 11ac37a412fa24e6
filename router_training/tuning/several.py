"""A run of several adapters at once, from rows to their directories."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import BaseFiles
from router_training.tuning import ranks
from router_training.tuning.interrupts import Interrupts
from router_training.tuning.prepared import Prepared, of_adapter, rows_a_step, steps_of, weighted
from router_training.tuning.progress import CHECKPOINT, Progress
from router_training.tuning.recorder import PlainRecorder
from router_training.tuning.results import Facts, write_card, write_manifest
from router_training.tuning.settings import TuneSettings
from router_training.tuning.stopped import CHECKPOINTS, claim
from router_training.tuning.together import held_out_losses, load_for, save_all, train_together

ADAPTERS = "adapters"


def train_several(
    settings: TuneSettings,
    names: Sequence[str],
    base: BaseFiles,
    prepared: Prepared,
    log: Callable[[str], None],
) -> tuple[dict[str, Path], dict[str, Mapping[str, float]], bool]:
    """Directories and losses by name, and whether the run came to its end.

    Raises InvalidArgument for several processes, and where the output directory has a run of other
    settings.
    """
    if ranks.count() > 1:
        raise InvalidArgument(
            "datasets: several adapters at once are trained by one process; start it without "
            "torchrun, or train them one by one",
            field="datasets",
        )
    out = Path(settings.output_dir)
    rows = weighted(prepared.train, settings.seed)
    steps, a_pass = steps_of(settings, len(rows)), rows_a_step(settings)
    checkpoint = out / CHECKPOINTS / CHECKPOINT
    goes_on = checkpoint.exists()
    claim(settings, prepared.digest, base.fingerprint, goes_on=goes_on)
    if goes_on:
        log("going on from the checkpoint")
    decoder = load_for(settings)
    before = held_out_losses(decoder, None, names, prepared.held_out)
    interrupts = Interrupts()
    recorder = PlainRecorder(out, steps, goes_on=goes_on)
    progress = Progress(
        checkpoint,
        settings.eval_steps or settings.save_steps or math.ceil(len(rows) / a_pass),
        lambda adapters: held_out_losses(decoder, adapters, names, prepared.held_out),
        recorder.held_out,
        patience=settings.early_stopping_patience,
        best=settings.load_best_model_at_end,
        stop=lambda: interrupts.wished,
    )
    interrupts.begin()
    try:
        last = train_together(settings, names, decoder, rows, steps, recorder.step, progress)
    finally:
        interrupts.end()
    adapters = progress.best(last)
    after = held_out_losses(decoder, adapters, names, prepared.held_out)
    directories = save_all(adapters, names, out / ADAPTERS, settings.base_model)
    trained = sum(p.numel() for p in adapters.parameters()) // len(names)
    metrics: dict[str, Mapping[str, float]] = {}
    for i, (name, directory) in enumerate(directories.items()):
        own = [s for s in prepared.train if s.adapter == name]
        held_out = of_adapter(prepared.held_out, name)
        found = {"loss_before": before[i], "loss_after": after[i]} if i in before else {}
        metrics[name] = found
        prompts = [s.example.prompt for s in own]
        write_card(directory, settings, prompts, len(own), base.fingerprint)
        counts = {"train": len(own), "held_out": len(held_out)}
        facts = Facts(name, base, prepared.digest, recorder.last or steps, trained)
        write_manifest(directory, settings, facts, counts, found)
    return directories, metrics, not interrupts.wished
