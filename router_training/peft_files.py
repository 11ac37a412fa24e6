"""Trained adapters as PEFT's directories, and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mora_serve.adapters.peft_config import parse_config
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import PROJECTIONS, ModelShape, projection_path
from mora_serve.model.stacked import StackedAdapters


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
