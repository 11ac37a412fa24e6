"""The adapter that a run begins with: a new one, one that EVA begins, or one that is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mora_serve.adapters.card import FILE as CARD_FILE
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import ModelShape
from router_training.tuning.encoding import IGNORED
from router_training.tuning.model import peft_config
from router_training.tuning.prepared import Sample
from router_training.tuning.settings import TuneSettings

EVA_BATCHES = 16  # that EVA sees, as often as it takes


def with_adapter(
    settings: TuneSettings,
    model: Any,
    shape: ModelShape,
    steps: int,
    samples: Sequence[Sample],
    fingerprint: str = "",
) -> Any:
    """A base with the adapter that is to be trained, as a PEFT model.

    ``steps`` are the whole run's, which AdaLoRA plans by; EVA looks at the first ``samples``;
    ``fingerprint`` is the base's, which an adapter to go on with may name.
    Raises InvalidArgument for a ``start_from`` that is no adapter of this base.
    """
    from peft import PeftModel, get_peft_model, initialize_lora_eva_weights

    if settings.start_from:
        directory = Path(settings.start_from)
        if not (directory / "adapter_config.json").is_file():
            raise InvalidArgument(
                f"start_from: {directory.name!r} has no adapter_config.json; give a directory "
                "that PEFT or this trainer has saved",
                field="start_from",
            )
        card = directory / CARD_FILE
        named = json.loads(card.read_text()).get("base_fingerprint") if card.is_file() else ""
        if named and named != fingerprint:
            raise InvalidArgument(
                f"start_from: {directory.name!r} was trained on base {named}, this run is on "
                f"{fingerprint}; give an adapter of this base",
                field="start_from",
            )
        try:
            return PeftModel.from_pretrained(model, str(directory), is_trainable=True)
        except (RuntimeError, ValueError) as e:
            raise InvalidArgument(
                f"start_from: {directory.name!r} does not fit the base; give an adapter of "
                f"{settings.base_model!r}",
                field="start_from",
            ) from e
    adapted = get_peft_model(model, peft_config(settings, shape, steps))
    if settings.peft_init_lora_weights == "eva":
        rows = settings.micro_batch_size
        batches = padded(samples[: EVA_BATCHES * rows], rows)
        initialize_lora_eva_weights(adapted, batches, show_progress_bar=False)
    return adapted


def padded(samples: Sequence[Sample], rows: int) -> list[Mapping[str, Tensor]]:
    """Batches of so many rows, filled up at the end, as a model takes them."""
    batches: list[Mapping[str, Tensor]] = []
    for start in range(0, len(samples), rows):
        own = [s.encoded for s in samples[start : start + rows]]
        length = max(len(e.ids) for e in own)
        ids = torch.zeros(len(own), length, dtype=torch.long)
        labels = torch.full((len(own), length), IGNORED)
        mask = torch.zeros(len(own), length, dtype=torch.long)
        for i, e in enumerate(own):
            ids[i, : len(e.ids)] = torch.tensor(e.ids)
            labels[i, : len(e.labels)] = torch.tensor(e.labels)
            mask[i, : len(e.ids)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches
