"""From settings to adapters that serve: train, answer held-out rows, check, register."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mora_serve.client import Client
from mora_serve.core import API_KEY
from mora_serve.errors import InvalidArgument
from mora_serve.model.loading import BaseFiles, read_base
from router_training.trainable import check_trainable
from router_training.tuning import ranks
from router_training.tuning.answers import METRICS, Answered, answer, answerable, served, upload
from router_training.tuning.encoding import CHATML, Encoder
from router_training.tuning.general import PREFIX, check_tasks, general_ability
from router_training.tuning.machine import check_machine
from router_training.tuning.prepared import Prepared, Sample, of_adapter, prepare
from router_training.tuning.report import write_report
from router_training.tuning.results import MANIFEST_FILE, add_metrics
from router_training.tuning.run import Log, held_out_loss, train
from router_training.tuning.settings import Check, TuneSettings, four_bit

VERDICTS = {True: "passed", False: "REFUSED", None: "not made: nothing was measured"}
GENERAL = "general"  # exact match of what the base can do

# of the base and of the adapter by name, and the held-out rows with both answers
Figures = tuple[dict[str, float], dict[str, float], list[Answered]]


@dataclass(frozen=True)
class Outcome:
    """Of one adapter: figures of the base alone and of the adapter by name, and what they led to.

    ``answered`` are the held-out rows with both answers.
    """

    name: str
    directory: Path
    before: Mapping[str, float]
    after: Mapping[str, float]
    answered: Sequence[Answered]
    passed: bool | None  # None: nothing was there to check
    registered: bool = False

    def lines(self) -> list[tuple[str, str]]:
        """What the terminal shows."""
        rows = [
            (f"{key}, before and after", f"{self.before[key]:.4f}  {self.after[key]:.4f}")
            for key in self.before
        ]
        rows.append(("quality check", VERDICTS[self.passed]))
        rows.append(("registered", "yes" if self.registered else "no"))
        return [("adapter", self.name), *rows, ("directory", str(self.directory))]


def whole_run(settings: TuneSettings, log: Log) -> list[Outcome]:
    """Train, evaluate through the server, check, and register where ``register_to`` says.

    Of several processes the first does all but train; the others return nothing.
    Raises what ``train`` raises, and Unavailable where no server can be reached.
    """
    check_machine(settings)
    check_tasks(settings)
    trained = train(settings, log)
    if not trained.finished:
        raise KeyboardInterrupt
    if not ranks.first():
        return []
    gc.collect()
    torch.cuda.empty_cache()  # what was trained on makes room for the server's copy
    found = evaluated(settings, trained.base, trained.prepared, trained.adapters, log)
    outcomes = []
    for name, directory in trained.adapters.items():
        before, after, answered = found.get(name, ({}, {}, ()))
        losses = trained.metrics.get(name, {})
        if "loss_before" in losses:
            before = {"loss": losses["loss_before"], **before}
            after = {"loss": losses["loss_after"], **after}
        passed = passes(settings.check, before, after)
        outcome = Outcome(name, directory, before, after, answered, passed)
        add_metrics(directory, {"before": before, "after": after, "passed": passed})
        write_report(outcome, Path(settings.output_dir))
        outcomes.append(outcome)
    if not settings.register_to:
        return outcomes
    for i, outcome in enumerate(outcomes):  # once all is written: no server may be there
        if outcome.passed:
            register(settings.register_to, outcome.name, outcome.directory, log)
            outcomes[i] = dataclasses.replace(outcome, registered=True)
    return outcomes


def evaluate(settings: TuneSettings, directories: Mapping[str, Path], log: Log) -> list[Outcome]:
    """Figures of adapters that are there, on the held-out rows of the settings.

    The adapters' manifests have them from then on. Raises InvalidArgument for preferences, and for
    an adapter that is not there.
    """
    if settings.rl is not None:
        raise InvalidArgument(
            "rl: preferences have no right answers; give rows to ask, without rl, and the same "
            "output_dir",
            field="rl",
        )
    for directory in directories.values():
        _present(directory, settings)
    check_machine(settings)
    check_trainable(settings.base_model, "base_model")
    base = read_base(settings.base_model)
    prepared = prepare(settings, base.tokenizer)
    found = evaluated(settings, base, prepared, directories, log)
    outcomes = []
    for name, directory in directories.items():
        before, after, answered = found.get(name, ({}, {}, []))
        held_out = of_adapter(prepared.held_out, name)
        if held_out:
            own = dataclasses.replace(prepared, held_out=held_out)
            losses = held_out_loss(settings, base, own, directory)
            before, after = {"loss": losses[0], **before}, {"loss": losses[1], **after}
        passed = passes(settings.check, before, after)
        add_metrics(directory, {"before": before, "after": after, "passed": passed})
        outcomes.append(Outcome(name, directory, before, after, answered, passed))
    return outcomes


def refuse_unfit(directory: Path) -> None:
    """Raises InvalidArgument for an adapter that the quality check has refused."""
    manifest = directory / MANIFEST_FILE
    if manifest.is_file() and json.loads(manifest.read_text())["metrics"].get("passed") is False:
        raise InvalidArgument(
            f"check: the quality check refused {directory.parent.name!r}; train it anew, or change "
            "check and measure it again with `eval`",
            field="check",
        )


def register(address: str, name: str, directory: Path, log: Log) -> None:
    """Upload an adapter to a server, in place of one of its name.

    With the key in MORA_API_KEY, if there is one; ``tls:HOST:PORT`` is an address with TLS.
    """
    _present(directory)
    key, plain = os.environ.get(API_KEY) or None, address.removeprefix("tls:")
    with Client(plain, api_key=key, tls=plain != address) as client:
        upload(client, name, directory)
    log(f"registered as {name} at {address}")


def _present(directory: Path, settings: TuneSettings | None = None) -> None:
    file = "config.json" if settings and settings.adapter == "full" else "adapter_config.json"
    if not (directory / file).is_file():
        raise InvalidArgument(
            f"output_dir: its {directory.name!r} has no {file}; train one first",
            field="output_dir",
        )


def evaluated(
    settings: TuneSettings,
    base: BaseFiles,
    prepared: Prepared | None,
    adapters: Mapping[str, Path],
    log: Log,
) -> dict[str, Figures]:
    """Figures of the base alone and of each adapter: of held-out rows, and of general tasks."""
    found = _answered(settings, base, prepared, adapters, log)
    if not settings.general_tasks:
        return found
    log(f"general ability: {', '.join(settings.general_tasks)}")
    general, own = general_ability(settings, base, adapters)
    nothing: Figures = ({}, {}, [])
    return {
        name: (before | general, after | own[name], rows)
        for name, (before, after, rows) in ((n, found.get(n, nothing)) for n in adapters)
    }


def _answered(
    settings: TuneSettings,
    base: BaseFiles,
    prepared: Prepared | None,
    adapters: Mapping[str, Path],
    log: Log,
) -> dict[str, Figures]:
    """The metrics of the base alone and of each adapter, of answers that a server generates.

    Of full fine-tuning, the server's base is what was trained.
    """
    if prepared is None or not (settings.metrics or prepared.general):
        return {}
    general = answerable(prepared.general, settings.eval_rows)
    asked: dict[str, list[Sample]] = {}
    for name in adapters:
        own = of_adapter(prepared.held_out, name) if settings.metrics else []
        asked[name] = [*answerable(own, settings.eval_rows), *general]
    if not any(asked.values()):
        return {}
    template = CHATML if settings.chat_template == "chatml" else None
    encoder = Encoder(base.tokenizer, settings.sequence_len, template=template)
    questions = {n: [encoder.question(s.example) for s in own] for n, own in asked.items()}
    quantization = "nf4" if four_bit(settings) else "none"
    full = settings.adapter == "full"
    log(f"answering {sum(map(len, asked.values()))} held-out rows")
    alone: dict[str, list[str]] = {}
    adapted: dict[str, list[str]] = {}
    with served(settings.base_model, quantization) as client:
        for name, samples in asked.items():
            alone[name] = answer(client, samples, None, questions[name])
            if not full:
                upload(client, name, adapters[name])
                adapted[name] = answer(client, samples, name, questions[name])
    for name, samples in asked.items() if full else ():
        with served(str(adapters[name]), quantization) as client:
            adapted[name] = answer(client, samples, None, questions[name])
    return {
        name: _figures(settings, samples, len(general), alone[name], adapted[name])
        for name, samples in asked.items()
    }


def _figures(
    settings: TuneSettings,
    samples: Sequence[Sample],
    general: int,
    alone: Sequence[str],
    adapted: Sequence[str],
) -> Figures:
    """Of the held-out rows, and of the last ``general`` ones apart."""
    wanted = [s.example.answer for s in samples]
    own = len(samples) - general
    found = []
    for got in (alone, adapted):
        metrics = {m: METRICS[m](got[:own], wanted[:own]) for m in settings.metrics if own}
        if general:
            metrics[GENERAL] = METRICS["exact_match"](got[own:], wanted[own:])
        found.append(metrics)
    rows = zip(samples[:own], wanted[:own], alone[:own], adapted[:own], strict=True)
    answered = [Answered(s.example.prompt, w, a, b) for s, w, a, b in rows]
    return found[0], found[1], answered


def passes(check: Check, before: Mapping[str, float], after: Mapping[str, float]) -> bool | None:
    """Whether the adapter is no worse than the base, but for the margins.

    None where what the check is of was not measured.
    """
    general = [key for key in before if key == GENERAL or key.startswith(PREFIX)]
    if any(after[key] < before[key] - check.general_margin for key in general):
        return False
    if check.metric == "none":
        return True
    if check.metric not in before:
        return None
    gain = after[check.metric] - before[check.metric]
    return (-gain if check.metric == "loss" else gain) >= -check.margin
