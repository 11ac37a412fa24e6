"""Several adapters at once on one base: rows of all of them share each pass (SFT only).

The decoder and the low-rank layer are the server's own, so that an adapter is trained as it is
served. A step's loss is the mean over the learned tokens of its rows, as TRL's trainer has it; the
optimiser is AdamW in 32 bits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mora_serve.config import BaseConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model.decoder import Decoder
from mora_serve.model.loading import load_base
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, Follower, MixedRow, row_losses, train_on
from router_training.batches import TokenRow, chunks
from router_training.peft_files import save_peft
from router_training.tuning.encoding import IGNORED, Encoded
from router_training.tuning.prepared import Sample, of_adapter, rows_a_step
from router_training.tuning.settings import TuneSettings, four_bit

BETAS = (0.9, 0.999)  # transformers'


@dataclass(frozen=True, slots=True)
class WeightedRow(MixedRow):
    """A row whose mean loss counts ``share`` times: by its tokens among the batch's."""

    share: float = 1.0


def together(settings: TuneSettings) -> tuple[str, ...]:
    """The adapters that the datasets name, sorted; none where one adapter is trained.

    Raises InvalidArgument where some datasets name one and others do not, and for settings that
    several at once do not have.
    """
    names = sorted({d.adapter for d in settings.datasets if d.adapter})
    if not names:
        return ()
    for i, dataset in enumerate(settings.datasets):
        if not dataset.adapter and not dataset.replay:
            raise InvalidArgument(
                f"datasets.{i}.adapter: other datasets name theirs; name the adapter that learns "
                "from this one",
                field=f"datasets.{i}.adapter",
            )
    unlike = {
        "adapter": settings.adapter == "full",
        "adalora": settings.adalora,
        "lora_drop": settings.lora_drop is not None,
        "peft_use_dora": settings.peft_use_dora,
        "peft_use_rslora": settings.peft_use_rslora,
        "peft_init_lora_weights": settings.peft_init_lora_weights != "default",
        "loraplus_lr_ratio": settings.loraplus_lr_ratio != 0,
        "lora_rank_pattern": bool(settings.lora_rank_pattern),
        "lora_alpha_pattern": bool(settings.lora_alpha_pattern),
        "lora_dropout": settings.lora_dropout != 0,
        "start_from": bool(settings.start_from),
        "sample_packing": settings.sample_packing,
        "optimizer": settings.optimizer not in ("auto", "adamw_torch", "adamw_torch_fused"),
        "bf16": settings.bf16 is True,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "attn_implementation": settings.attn_implementation != "auto",
        "liger_kernel": settings.liger_kernel,
        "bnb_4bit_use_double_quant": settings.bnb_4bit_use_double_quant,
        "report_to": bool(settings.report_to),
    }
    for key, set_ in unlike.items():
        if set_:
            raise InvalidArgument(
                f"{key}: several adapters at once are trained without it; leave it out, or train "
                "them one by one",
                field=key,
            )
    return tuple(names)


def token_rows(encoded: Encoded) -> list[TokenRow]:
    """A row for each run of learned tokens, after all that comes before it."""
    rows, start = [], None
    for i, label in enumerate((*encoded.labels, IGNORED)):
        if label != IGNORED and start is None:
            start = i
        if label == IGNORED and start is not None:
            rows.append(TokenRow(encoded.ids[:start], encoded.ids[start:i]))
            start = None
    return rows


def shared(rows: Sequence[MixedRow]) -> list[WeightedRow]:
    """A batch whose mean over rows is the mean over learned tokens."""
    tokens = sum(len(row.tokens.answer) for row in rows)
    return [
        WeightedRow(r.tokens, r.mixture, len(rows) * len(r.tokens.answer) / tokens) for r in rows
    ]


def token_mean(decoder: Decoder, adapters: StackedAdapters, rows: Sequence[MixedRow]) -> Tensor:
    """The rows' losses [rows], each as often as it counts."""
    shares = torch.tensor([row.share for row in rows if isinstance(row, WeightedRow)])
    return row_losses(decoder, adapters, rows) * shares


def batches(
    samples: Sequence[Sample], names: Sequence[str], settings: TuneSettings
) -> Iterator[Sequence[MixedRow]]:
    """Batches of shuffled rows, endlessly; rows of replay go to all adapters in turn."""
    rng = random.Random(settings.seed)
    size = rows_a_step(settings)
    turn = 0
    while True:
        order = list(samples)
        rng.shuffle(order)
        for start in range(0, len(order), size):
            rows: list[MixedRow] = []
            for sample in order[start : start + size]:
                if sample.adapter:
                    index = names.index(sample.adapter)
                else:
                    index, turn = turn % len(names), turn + 1
                rows += [MixedRow(t, ((index, 1.0),)) for t in token_rows(sample.encoded)]
            yield shared(rows)


def schedule(settings: TuneSettings, steps: int) -> Callable[[int], float]:
    """The learning rate's share at a step from 0, as transformers' schedulers have it."""
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * steps)
    kind = settings.lr_scheduler

    def share(step: int) -> float:
        if step < warmup and kind != "constant":
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, steps - warmup)
        if kind == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return max(0.0, 1 - progress) if kind == "linear" else 1.0

    return share


def load_for(settings: TuneSettings) -> Decoder:
    """The base as it is served, computing in 32 bits."""
    quantization: Literal["nf4", "none"] = "nf4" if four_bit(settings) else "none"
    config = BaseConfig(settings.base_model, quantization, dtype="fp32", device="cpu")
    return load_base(config).decoder


def recipe_of(settings: TuneSettings, steps: int) -> AdapterRecipe:
    """The settings as the batched trainer has them; AdamW as transformers has it."""
    return AdapterRecipe(
        rank=settings.lora_r,
        alpha=settings.lora_alpha,
        targets=settings.lora_target_modules,
        steps=steps,
        lr=settings.learning_rate,
        clip=settings.max_grad_norm,
        seed=settings.seed,
        betas=BETAS,
        weight_decay=settings.weight_decay,
    )


def train_together(
    settings: TuneSettings,
    names: Sequence[str],
    decoder: Decoder,
    samples: Sequence[Sample],
    steps: int,
    note: Callable[[int, float], None],
    follower: Follower | None = None,
) -> StackedAdapters:
    """Train an adapter for each name on the samples that are its own."""
    torch.manual_seed(settings.seed)
    recipe = recipe_of(settings, steps)
    adapters = StackedAdapters(decoder.shape, len(names), recipe.rank, recipe.alpha, recipe.targets)
    return train_on(
        decoder,
        adapters,
        batches(samples, names, settings),
        recipe,
        note,
        losses=token_mean,
        schedule=schedule(settings, steps),
        follower=follower,
    )


def save_all(
    adapters: StackedAdapters, names: Sequence[str], out: Path, base: str
) -> dict[str, Path]:
    """Write each adapter's PEFT directory under its name."""
    directories = {name: out / name for name in names}
    for i, directory in enumerate(directories.values()):
        save_peft(adapters, i, directory, base)
    return directories


def held_out_losses(
    decoder: Decoder,
    adapters: StackedAdapters | None,
    names: Sequence[str],
    samples: Sequence[Sample],
) -> dict[int, float]:
    """Mean loss a learned token of the held-out rows of each adapter that has some, by its index;
    without adapters, the base's."""
    found: dict[int, float] = {}
    for i, name in enumerate(names):
        own = of_adapter(samples, name)
        tokens = [t for s in own for t in token_rows(s.encoded)]
        mixture = ((i, 1.0),) if adapters is not None else ()
        rows = [MixedRow(t, mixture) for t in tokens]
        if not rows:
            continue
        total = 0.0
        for part in chunks(rows):
            with torch.no_grad():
                losses = row_losses(decoder, adapters, part)
            counts = torch.tensor([float(len(r.tokens.answer)) for r in part])
            total += float(losses @ counts)
        found[i] = total / sum(len(r.tokens.answer) for r in rows)
    return found
