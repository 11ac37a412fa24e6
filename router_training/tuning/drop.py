"""LoRA-Drop (Zhou et al. 2024, arXiv 2402.07721): layers whose adapters say little do without.

After a few steps, the mean square of what each module's adapter adds is measured on a sample.
Within each projection the layers are kept by falling importance until they hold ``threshold`` of
it; the others lose their adapter, or share one. Then training goes on.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router_training.tuning.settings import LoraDrop

DECISION_FILE, EXPLORED = "lora_drop.json", "before-lora-drop"
_MODULE = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")


@dataclass(frozen=True)
class Decision:
    """Importance of each layer [layers] by projection, summing to 1, and the layers kept."""

    mode: str
    threshold: float
    importance: Mapping[str, Sequence[float]]
    kept: Mapping[str, Sequence[int]]
    of: str = ""  # what run it was made in: a digest of its settings, rows and base

    @property
    def share_kept(self) -> float:
        """Kept modules over all."""
        total = sum(map(len, self.importance.values()))
        return sum(map(len, self.kept.values())) / total

    def write(self, directory: Path) -> None:
        """Record it beside the adapter."""
        (directory / DECISION_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Decision | None:
        """What was recorded, if anything was."""
        file = directory / DECISION_FILE
        return cls(**json.loads(file.read_text())) if file.exists() else None


def modules_of(model: Any) -> dict[tuple[str, int], tuple[str, Any]]:
    """PEFT's LoRA modules by (projection, layer), with their names."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_B") and "default" in module.lora_B:
            match = _MODULE.search(name)
            if match is not None:
                found[match[2], int(match[1])] = (name, module)
    return found


@torch.no_grad()
def measure(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> dict[tuple[str, int], float]:
    """The sum over tokens of |s B A x|^2 of every module, over ``padded`` batches."""
    sums: dict[tuple[str, int], float] = defaultdict(float)
    mask = torch.empty(0)  # [rows, length], of the batch that runs
    handles = []
    for key, (_, module) in modules_of(model).items():
        scaling = module.scaling["default"]

        def note(_: Any, __: Any, out: Tensor, key: Any = key, scaling: float = scaling) -> None:
            squares = (out.float() * scaling).pow(2).sum(-1)
            sums[key] += float((squares.view(mask.shape) * mask).sum())

        handles.append(module.lora_B["default"].register_forward_hook(note))
    training = model.training
    model.eval()
    try:
        for batch in batches:
            device = next(model.parameters()).device
            mask = batch["attention_mask"].to(device)
            model(**{k: v.to(device) for k, v in batch.items() if k != "labels"})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return dict(sums)


def decide(sums: Mapping[tuple[str, int], float], settings: LoraDrop) -> Decision:
    """Which layers of each projection are kept; at least the most important one."""
    importance: dict[str, list[float]] = {}
    kept: dict[str, list[int]] = {}
    for projection in dict.fromkeys(p for p, _ in sums):
        own = {layer: value for (p, layer), value in sums.items() if p == projection}
        total = sum(own.values()) or 1.0
        importance[projection] = [own[layer] / total for layer in sorted(own)]
        held = 0.0
        chosen: list[int] = []
        for layer in sorted(own, key=lambda i: (-own[i], i)):
            if chosen and held >= settings.threshold:
                break
            chosen.append(layer)
            held += own[layer] / total
        kept[projection] = sorted(chosen)
    return Decision(settings.mode, settings.threshold, importance, kept)


def reduced(model: Any, decision: Decision, explored: Path) -> Any:
    """A base with the adapters that the decision leaves, as they were when it was made.

    ``explored`` is the directory of all of them. A PEFT model that is trained.
    """
    from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    if decision.mode == "share":
        adapted = PeftModel.from_pretrained(model, str(explored), is_trainable=True)
        _share(adapted, decision)
        return adapted
    config = LoraConfig.from_pretrained(str(explored))
    config.target_modules, config.inference_mode = target_pattern(decision), False
    adapted = get_peft_model(model, config)
    wanted = {name for name, _ in modules_of(adapted).values()}
    tensors = load_file(explored / "adapter_model.safetensors")
    kept = {key: t for key, t in tensors.items() if key.partition(".lora_")[0] in wanted}
    set_peft_model_state_dict(adapted, kept)
    return adapted


def _share(model: Any, decision: Decision) -> None:
    """Let the modules that are not kept share one adapter within each projection."""
    first: dict[str, Any] = {}
    for (projection, layer), (_, module) in modules_of(model).items():
        if layer not in decision.kept[projection]:
            one = first.setdefault(projection, module)
            module.lora_A["default"].weight = one.lora_A["default"].weight
            module.lora_B["default"].weight = one.lora_B["default"].weight


def sample_of(lengths: Sequence[int], share: float, seed: int) -> list[int]:
    """Rows that importance is measured on, in order: by chance, one of each stratum of lengths."""
    size = max(1, round(share * len(lengths)))
    ranked = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    rng = random.Random(seed)
    bounds = [len(ranked) * i // size for i in range(size + 1)]
    return sorted(rng.choice(ranked[a:b]) for a, b in itertools.pairwise(bounds))


def target_pattern(decision: Decision) -> str:
    """A pattern of the kept modules for PEFT's ``target_modules``."""
    parts = []
    for projection, layers in decision.kept.items():
        block = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        numbers = "|".join(map(str, layers))
        parts.append(rf"layers\.({numbers})\.{block}\.{projection}")
    return rf".*\.({'|'.join(parts)})"
