"""Train many adapters in one pass: every row of a batch has its own mixture.

The decoder and the low-rank layer are the server's own, in its differentiable form; the base
stays as it is served (4-bit where it is).
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mora_serve.adapters.peft_config import parse_config
from mora_serve.errors import InvalidArgument
from mora_serve.model.attention import DenseCausal, SomeQueries
from mora_serve.model.decoder import Decoder, Wanted
from mora_serve.model.shape import PROJECTIONS, ModelShape, projection_path
from mora_serve.model.stacked import StackedAdapters
from router_training.batches import TokenBatch, TokenRow, bucketed, chunks, collate

Log = Callable[[str], None]

# A base of at most so many parameters is dequantised once instead of twice a chunk.
DENSE_PARAMETERS = 500_000_000


@dataclass(frozen=True)
class AdapterRecipe:
    """AdamW with a warm-up and a cosine; ``clip`` bounds the norm over all adapters.

    ``buckets`` batches are drawn at a time and sorted by length. Take 1 where few rows are drawn
    again and again: sorted, copies of one row would fill a batch. ``layer_scales``: a factor for
    each adapter and layer is learned too.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    steps: int = 200
    rows: int = 96
    lr: float = 4e-3
    warmup: int = 30
    clip: float = 1.0
    buckets: int = 16
    layer_scales: bool = False
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


Losses = Callable[[Decoder, StackedAdapters, Sequence[MixedRow]], Tensor]


def row_losses(
    decoder: Decoder,
    adapters: StackedAdapters,
    rows: Sequence[MixedRow],
    weights: Tensor | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of each row's answer tokens [rows].

    ``weights`` [rows, count] stand for the rows' own mixtures where given; see
    ``StackedAdapters.mix`` for ``support``.
    """
    batch = collate([row.tokens for row in rows])
    wanted = batch.answer.flatten().nonzero().flatten()
    if weights is None:
        weights = mixture_weights(rows, adapters.count)
    hidden = batch_hidden(decoder, batch, adapters, weights, wanted, support)
    losses = F.cross_entropy(
        decoder.logits(hidden), batch.targets.flatten()[wanted], reduction="none"
    )
    row = wanted // batch.inputs.shape[1]
    sums = torch.zeros(len(rows)).index_add(0, row, losses)
    return sums / batch.answer.sum(1)


def train_adapters(
    decoder: Decoder,
    count: int,
    draw: Callable[[], MixedRow],
    recipe: AdapterRecipe,
    log: Log = print,
    prepare: Callable[[StackedAdapters], None] | None = None,
    penalty: Callable[[StackedAdapters], Tensor] | None = None,
    *,
    start: StackedAdapters | None = None,
    losses: Losses = row_losses,
    besides: Sequence[dict[str, Any]] = (),
) -> StackedAdapters:
    """Train ``count`` adapters on rows from ``draw``; the loss is the mean over rows of what
    ``losses`` gives, and ``penalty`` of the adapters, where given.

    ``start``: adapters to go on with, instead of new ones of the recipe's size. ``prepare`` gets
    the adapters before the first step. ``besides`` are further groups of parameters for the
    optimiser, whose learning rates follow the same schedule. An adapter that no row uses stays as
    it was initialised.
    """
    torch.manual_seed(recipe.seed)
    decoder = trained_through(decoder)
    adapters = start or StackedAdapters(
        decoder.shape, count, recipe.rank, recipe.alpha, recipe.targets, recipe.layer_scales
    )
    if recipe.layer_scales and adapters.scales is None:
        adapters.scales = nn.Parameter(torch.ones(count, decoder.shape.layers))
    adapters.requires_grad_()
    if prepare is not None:
        prepare(adapters)
    parameters = list(adapters.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": recipe.lr}, *besides],
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe))
    rng = random.Random(recipe.seed)
    batches = bucketed(draw, lambda row: len(row.tokens), recipe.rows, rng, recipe.buckets)
    started, recent = time.monotonic(), 0.0
    for step in range(1, recipe.steps + 1):
        optimizer.zero_grad()
        loss = 0.0
        # Side by side, rows of one adapter leave the others out of the product.
        for part in chunks(sorted(next(batches), key=lambda row: row.mixture)):
            share = losses(decoder, adapters, part).sum() / recipe.rows
            torch.autograd.backward(share)
            loss += share.item()
        if penalty is not None:
            torch.autograd.backward(penalty(adapters))
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
        recent = loss if step == 1 else 0.9 * recent + 0.1 * loss
        if step % 25 == 0 or step == recipe.steps:
            seconds = time.monotonic() - started
            eta = seconds / step * (recipe.steps - step)
            log(f"adapters {step}/{recipe.steps} {seconds:.0f}s eta {eta:.0f}s loss {recent:.3f}")
    return adapters.requires_grad_(False)


def trained_through(decoder: Decoder) -> Decoder:
    """The decoder as training runs it: dense where the base is small enough for that."""
    return decoder.dense() if decoder.shape.linear_parameters <= DENSE_PARAMETERS else decoder


def batch_hidden(
    decoder: Decoder,
    batch: TokenBatch,
    adapters: StackedAdapters | None = None,
    weights: Tensor | None = None,
    wanted: Tensor | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """Last hidden states [B * L, hidden] of a padded batch; weights and support [B, count].

    With ``wanted`` [n], ascending indices into B * L, those of these tokens alone: [n, hidden].
    """
    rows, length = batch.inputs.shape
    window = decoder.shape.sliding_window
    mixture = last = None
    if adapters is not None and weights is not None:
        mixture = adapters.mix(weights, length, support)
    if wanted is not None:
        some = None if mixture is None else mixture.at(wanted)
        last = Wanted(wanted, SomeQueries(wanted, rows, length, window), some)
    return decoder.hidden(
        batch.inputs.flatten(),
        torch.arange(length).repeat(rows),
        DenseCausal(rows, length, window),
        mixture,
        last,
    )


def _rate(step: int, recipe: AdapterRecipe) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup) * max(0.02, cosine)


def save_peft(adapters: StackedAdapters, index: int, directory: Path, base_name: str = "") -> None:
    """Write one adapter as PEFT does: adapter_config.json and adapter_model.safetensors (fp16)."""
    from peft import LoraConfig

    directory.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        base_model_name_or_path=base_name,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=adapters.rank,
        lora_alpha=int(adapters.alpha) if float(adapters.alpha).is_integer() else adapters.alpha,
        target_modules=sorted(adapters.targets),
        alpha_pattern=_scaled_alphas(adapters, index),
    ).save_pretrained(str(directory))
    _sort_targets(directory / "adapter_config.json")
    tensors = {k: v.half().contiguous() for k, v in adapters.export(index).items()}
    file = directory / "adapter_model.safetensors"
    save_file(tensors, str(file), metadata={"format": "pt"})
    file.chmod(0o644)


def _sort_targets(file: Path) -> None:
    # PEFT writes a set, in another order each run.
    config = json.loads(file.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _scaled_alphas(adapters: StackedAdapters, index: int) -> dict[str, float]:
    """Layer scales as PEFT's ``alpha_pattern``: an alpha for every module by its path."""
    if adapters.scales is None:
        return {}
    scales = adapters.scales[index].tolist()
    return {
        projection_path(layer, projection): adapters.alpha * scale
        for layer, scale in enumerate(scales)
        for projection in adapters.targets
    }


def load_peft(shape: ModelShape, directories: Sequence[Path]) -> StackedAdapters:
    """Stack saved adapters, as fp32. No gradients are asked for; ``requires_grad_()`` does.

    They may differ in rank, alpha, patterns and targets: a lower rank is filled up with zeros,
    which training leaves zeros, and what scalings differ by goes into B.
    Raises InvalidArgument for what cannot be read or served, and for DoRA, which cannot be stacked.
    """
    found = [_read_peft(shape, directory) for directory in directories]
    modules = [module for adapter in found for module in adapter.values()]
    rank = max(len(module.a) for module in modules)
    scalings = {module.scaling * rank for module in modules if len(module.a) == rank}
    alpha = scalings.pop() if len(scalings) == 1 else float(rank)
    targets = [p for p in PROJECTIONS if any(p == name for own in found for _, name in own)]
    stacked = StackedAdapters(shape, len(found), rank, alpha, targets).requires_grad_(False)
    for index, own in enumerate(found):
        for layer, name in itertools.product(range(shape.layers), targets):
            a, b = stacked.projection(layer, name, index)
            a.zero_()
            if module := own.get((layer, name)):
                a[: len(module.a)] = module.a
                b[: len(module.a)] = module.b.T
                if module.scaling * rank != alpha:
                    b.mul_(module.scaling * rank / alpha)
    return stacked


class _Module(NamedTuple):
    """One projection of one layer: A [rank, in], B [out, rank]."""

    a: Tensor
    b: Tensor
    scaling: float


def _read_peft(shape: ModelShape, directory: Path) -> dict[tuple[int, str], _Module]:
    try:
        settings = parse_config((directory / "adapter_config.json").read_bytes())
        tensors = load_file(str(directory / "adapter_model.safetensors"))
    except (OSError, SafetensorError) as e:
        raise _unreadable(directory, f"it cannot be read ({type(e).__name__})") from e
    if settings.use_dora:
        raise _unreadable(directory, "DoRA adapters cannot be trained together")
    ranks, alphas = settings.ranks(), settings.alphas()
    modules = {}
    for layer, name in itertools.product(range(shape.layers), PROJECTIONS):
        path = projection_path(layer, name)
        a, b = (tensors.pop(f"base_model.model.{path}.lora_{x}.weight", None) for x in "AB")
        if a is None and b is None:
            continue
        rank = ranks.get(path, settings.r)
        out, columns = shape.projection(name)
        if a is None or b is None or a.shape != (rank, columns) or b.shape != (out, rank):
            raise _unreadable(directory, f"its tensors of {path} do not fit rank and base")
        scaling = settings.scaling(alphas.get(path, settings.lora_alpha), rank)
        modules[layer, name] = _Module(a.float(), b.float(), scaling)
    if tensors or not modules:
        stray = next(iter(tensors), "none of a known module")
        raise _unreadable(directory, f"tensors that no projection has: {stray}")
    return modules


def _unreadable(directory: Path, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"adapters: {directory.name!r}: {why}; give directories that PEFT saved for this base",
        field="adapters",
    )


def subset(adapters: StackedAdapters, indices: Sequence[int]) -> StackedAdapters:
    """A stack of some of the adapters, copied, in the order given; for evaluation."""
    out = StackedAdapters(
        adapters.shape,
        len(indices),
        adapters.rank,
        adapters.alpha,
        adapters.targets,
        adapters.scales is not None,
    ).requires_grad_(False)
    for place, index in enumerate(indices):
        _copy(adapters, index, out, place)
    return out


def copy_adapter(adapters: StackedAdapters, source: int, target: int) -> None:
    """Overwrite one adapter of a stack with another, also in the middle of training."""
    _copy(adapters, source, adapters, target)


@torch.no_grad()
def _copy(source: StackedAdapters, index: int, target: StackedAdapters, place: int) -> None:
    for key in source.a:
        if key.endswith(f"/{index}"):
            other = f"{key.rpartition('/')[0]}/{place}"
            target.a[other].copy_(source.a[key])
            target.b[other].copy_(source.b[key])
    if source.scales is not None and target.scales is not None:
        target.scales[place] = source.scales[index]
