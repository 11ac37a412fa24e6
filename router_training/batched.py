"""Train many adapters in one pass: every row of a batch has its own mixture.

The decoder and the low-rank layer are the server's own, in its differentiable form; the base
stays as it is served (4-bit where it is).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mora_serve.model.attention import DenseCausal
from mora_serve.model.decoder import Decoder
from mora_serve.model.lora import StackedAdapters
from mora_serve.model.shape import PROJECTIONS, ModelShape
from router_training.batches import TokenBatch, TokenRow, bucketed, chunks, collate

Log = Callable[[str], None]


@dataclass(frozen=True)
class AdapterRecipe:
    """AdamW with a warm-up and a cosine; ``clip`` bounds the norm over all adapters."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    steps: int = 450
    rows: int = 96
    lr: float = 4e-3
    warmup: int = 30
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class MixedRow:
    """One row and its mixture: (adapter index, weight) pairs."""

    tokens: TokenRow
    mixture: tuple[tuple[int, float], ...]


def mixture_weights(rows: Sequence[MixedRow], count: int) -> Tensor:
    """The rows' mixtures as a matrix [rows, count]."""
    weights = torch.zeros(len(rows), count)
    for i, row in enumerate(rows):
        for adapter, weight in row.mixture:
            weights[i, adapter] += weight
    return weights


def train_adapters(
    decoder: Decoder,
    count: int,
    draw: Callable[[], MixedRow],
    recipe: AdapterRecipe,
    log: Log = print,
) -> StackedAdapters:
    """Train ``count`` adapters on rows from ``draw``; the loss is the mean over rows of the mean
    cross-entropy of a row's answer tokens.

    An adapter that no row uses stays as it was initialised.
    """
    torch.manual_seed(recipe.seed)
    adapters = StackedAdapters(decoder.shape, count, recipe.rank, recipe.alpha, recipe.targets)
    parameters = list(adapters.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    rng = random.Random(recipe.seed)
    batches = bucketed(draw, lambda row: len(row.tokens), recipe.rows, rng)
    start, recent = time.monotonic(), 0.0
    for step in range(1, recipe.steps + 1):
        optimizer.zero_grad()
        loss = 0.0
        # Side by side, rows of one adapter leave the others out of the product.
        for part in chunks(sorted(next(batches), key=lambda row: row.mixture)):
            share = row_losses(decoder, adapters, part).sum() / recipe.rows
            torch.autograd.backward(share)
            loss += share.item()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
        recent = loss if step == 1 else 0.9 * recent + 0.1 * loss
        if step % 25 == 0 or step == recipe.steps:
            seconds = time.monotonic() - start
            eta = seconds / step * (recipe.steps - step)
            log(f"adapters {step}/{recipe.steps} {seconds:.0f}s eta {eta:.0f}s loss {recent:.3f}")
    return adapters.requires_grad_(False)


def row_losses(decoder: Decoder, adapters: StackedAdapters, rows: Sequence[MixedRow]) -> Tensor:
    """Mean cross-entropy of each row's answer tokens [rows]."""
    batch = collate([row.tokens for row in rows])
    hidden = batch_hidden(decoder, batch, adapters, mixture_weights(rows, adapters.count))
    wanted = batch.answer.flatten().bool()
    losses = F.cross_entropy(
        decoder.logits(hidden[wanted]), batch.targets.flatten()[wanted], reduction="none"
    )
    row = torch.arange(len(rows)).repeat_interleave(batch.inputs.shape[1])[wanted]
    sums = torch.zeros(len(rows)).index_add(0, row, losses)
    return sums / batch.answer.sum(1)


def batch_hidden(
    decoder: Decoder,
    batch: TokenBatch,
    adapters: StackedAdapters | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Last hidden states [B * L, hidden] of a padded batch; weights [B, count]."""
    rows, length = batch.inputs.shape
    mixture = None
    if adapters is not None and weights is not None:
        mixture = adapters.mix(weights, length)
    return decoder.hidden(
        batch.inputs.flatten(),
        torch.arange(length).repeat(rows),
        DenseCausal(rows, length, decoder.shape.sliding_window),
        mixture,
    )


def _rate(step: int, recipe: AdapterRecipe) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup) * max(0.02, cosine)


def save_peft(adapters: StackedAdapters, index: int, directory: Path, base_name: str = "") -> None:
    """Write one adapter as PEFT does: adapter_config.json and adapter_model.safetensors (fp16)."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        base_model_name_or_path=base_name,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=adapters.rank,
        lora_alpha=int(adapters.alpha),
        target_modules=sorted(adapters.targets),
    ).save_pretrained(str(directory))
    _sort_targets(directory / "adapter_config.json")
    tensors = {k: v.half().contiguous() for k, v in adapters.export(index).items()}
    file = directory / "adapter_model.safetensors"
    save_file(tensors, str(file), metadata={"format": "pt"})
    file.chmod(0o644)


def _sort_targets(file: Path) -> None:
    # PEFT writes a set, in another order each run.
    import json

    config = json.loads(file.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_peft(shape: ModelShape, directories: Sequence[Path]) -> StackedAdapters:
    """Stack saved adapters of one rank, alpha and set of targets, as fp32, for evaluation.

    Raises ValueError when they differ in these, or when a tensor is missing.
    """
    import json

    from safetensors.torch import load_file

    configs = [json.loads((d / "adapter_config.json").read_text()) for d in directories]
    sizes = {(c["r"], c["lora_alpha"], tuple(c["target_modules"])) for c in configs}
    if len(sizes) != 1:
        raise ValueError(f"adapters differ in rank, alpha or targets: {sorted(sizes)}")
    rank, alpha, targets = sizes.pop()
    stacked = StackedAdapters(shape, len(directories), rank, alpha, targets)
    stacked.requires_grad_(False)
    for index, directory in enumerate(directories):
        _fill(stacked, index, load_file(str(directory / "adapter_model.safetensors")))
    return stacked


def _fill(stacked: StackedAdapters, index: int, tensors: dict[str, Any]) -> None:
    # What export gives are views of, or equal in shape to, the rows that the adapter holds.
    rows = slice(index * stacked.rank, (index + 1) * stacked.rank)
    names = iter(stacked.export(index))
    for key in stacked.a:
        for parameter, transposed in ((stacked.a[key], False), (stacked.b[key], True)):
            name = next(names)
            if name not in tensors:
                raise ValueError(f"adapter tensor {name} is missing")
            value = tensors[name].float()
            parameter[rows] = value.T if transposed else value
