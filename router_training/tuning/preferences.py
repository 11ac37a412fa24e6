"""Preferences: DPO, IPO, KTO, ORPO and SimPO by TRL's trainers, from the same settings."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_serve.errors import InvalidArgument
from mora_serve.model.tokenizer import Tokenizer
from router_training.tuning.encoding import CHATML
from router_training.tuning.formats import PREFERENCES
from router_training.tuning.model import masters_in_fp32
from router_training.tuning.prepared import held_out_of, times
from router_training.tuning.settings import Dataset, TuneSettings
from router_training.tuning.sft import arguments, stopping
from router_training.tuning.sources import rows_of


@dataclass(frozen=True)
class Preferences:
    """Rows as TRL's trainers take them: texts, prompts as the server sends them.

    ``asked`` are the rows to learn from as they were read; ``left_out`` those of ``datasets`` that
    are not learned because their prompts are among ``test_datasets``.
    """

    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    asked: Sequence[Mapping[str, Any]]
    left_out: int = 0

    @property
    def digest(self) -> str:
        """Of all rows, in order."""
        rows = json.dumps([list(self.train), list(self.held_out)], sort_keys=True)
        return hashlib.sha256(rows.encode()).hexdigest()


def read_preferences(settings: TuneSettings, tokenizer: Tokenizer) -> Preferences:
    """Rows of ``datasets``, those of some prompts held out. Raises InvalidArgument, naming the row
    that is wrong, and where nothing is left to learn."""
    asked = _rows(settings.datasets, settings)
    prompts = sorted({row["prompt"] for row in asked})
    left_out = 0
    if settings.test_datasets:
        held_out = _rows(settings.test_datasets, settings)
        apart = {row["prompt"] for row in held_out}
        left_out = sum(row["prompt"] in apart for row in asked)
    else:
        apart = held_out_of(prompts, settings, "prompts")
        held_out = [row for row in asked if row["prompt"] in apart]
    kept = [row for row in asked if row["prompt"] not in apart]
    if not kept:
        raise InvalidArgument(
            "datasets: every prompt is held out as well, so none is left to learn; give other "
            "rows as test_datasets, or leave them out",
            field="datasets",
        )
    train, held = (_rendered(rows, tokenizer, settings) for rows in (kept, held_out))
    return Preferences(train, held, kept, left_out)


def lengths(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Tokens of a rendered row's prompt with each of its answers, the end apart."""
    answers = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
    return [len(tokenizer.plain(row["prompt"] + answer)) for answer in answers]


def preference_trainer(
    settings: TuneSettings,
    model: Any,
    tokenizer: Any,
    rows: Preferences,
    out: Path,
    callbacks: Sequence[Any] = (),
) -> Any:
    """TRL's trainer of the method that ``rl`` names, what is trained in fp32."""
    from datasets import Dataset as Rows
    from datasets import disable_progress_bars
    from transformers import PrinterCallback

    disable_progress_bars()
    config, kind, own = _method(settings)
    trainer = kind(
        model=model,
        args=config(**{**arguments(settings, out, bool(rows.held_out)), **own}),
        train_dataset=Rows.from_list([dict(r) for r in rows.train]),
        eval_dataset=Rows.from_list([dict(r) for r in rows.held_out]) if rows.held_out else None,
        processing_class=as_it_is(tokenizer),
        callbacks=[*callbacks, *(stopping(settings) if rows.held_out else ())],
    )
    trainer.remove_callback(PrinterCallback)  # the recorder's lines say it
    masters_in_fp32(trainer.model)
    return trainer


def as_it_is(tokenizer: Any) -> Any:
    """A copy of transformers' tokenizer that adds nothing: rendered prompts have it all already."""
    from tokenizers.processors import TemplateProcessing

    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    return plain


def _method(s: TuneSettings) -> tuple[Any, Any, dict[str, Any]]:
    if s.rl in ("dpo", "ipo"):
        from trl import DPOConfig, DPOTrainer

        loss = "sigmoid" if s.rl == "dpo" else "ipo"
        return DPOConfig, DPOTrainer, {"beta": s.rl_beta, "loss_type": loss}
    if s.rl == "kto":
        from trl import KTOConfig, KTOTrainer

        weights = {
            "desirable_weight": s.kto_desirable_weight,
            "undesirable_weight": s.kto_undesirable_weight,
        }
        return KTOConfig, KTOTrainer, {"beta": s.rl_beta, **weights}
    if s.rl == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOConfig, ORPOTrainer, {"beta": s.rl_beta}
    if s.rl == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOConfig, CPOTrainer, {"beta": s.rl_beta, "loss_type": "simpo", "cpo_alpha": 0.0}
    raise InvalidArgument(
        "rl: it says which method `prefer` trains by; give dpo, ipo, kto, orpo or simpo", field="rl"
    )


def _rows(datasets: Sequence[Dataset], settings: TuneSettings) -> list[dict[str, Any]]:
    columns = PREFERENCES["kto" if settings.rl == "kto" else "dpo"]
    out = []
    rng = random.Random(settings.seed)
    for dataset in datasets:
        for where, row in rows_of(dataset):
            if missing := [c for c in columns if c not in row]:
                raise _wrong(where, f"it has no {missing[0]}", ", ".join(columns))
            texts = {c: row[c] for c in columns if c != "label"}
            for name, text in texts.items():
                if not isinstance(text, str) or not text:
                    raise _wrong(where, f"{name} is not a text", "texts")
            found: dict[str, Any] = dict(texts)
            if "label" in columns:
                if not isinstance(row["label"], bool):
                    raise _wrong(where, "label is neither true nor false", "one")
                found["label"] = row["label"]
            out += [found] * times(dataset.weight, rng)
    if not out:
        raise InvalidArgument(
            "datasets: there is no row in them; give files that have some", field="datasets"
        )
    return out


def _rendered(
    rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, settings: TuneSettings
) -> list[dict[str, Any]]:
    """Prompts as the server sends them: a chat's where the base has a template, or by ChatML."""
    template = CHATML if settings.chat_template == "chatml" else None
    if template is None and not tokenizer.has_chat_template:
        return [dict(row) for row in rows]

    def rendered(prompt: str) -> str:
        return tokenizer.render([("user", prompt)], template=template)

    return [{**row, "prompt": rendered(row["prompt"])} for row in rows]


def _wrong(where: str, what: str, give: str) -> InvalidArgument:
    return InvalidArgument(f"datasets: {where}: {what}; give {give}", field="datasets")
