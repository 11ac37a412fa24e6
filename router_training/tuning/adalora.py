"""AdaLoRA (Zhang et al. 2023): its budget during a run, and what it learned as plain LoRA.

PEFT's AdaLoRA adds B (E o A) x alpha / (rank left) where E is zero for the directions that were
taken away. As LoRA that is A's other rows times E, and B times the factor: with a rank of its own
for each module, and alpha the same, so that PEFT's scaling is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


class Budget(TrainerCallback):  # type: ignore[misc]  # transformers has no types for it
    """Moves ranks between modules after every step, by PEFT's schedule."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Gradients are still there."""
        model.base_model.update_and_allocate(state.global_step + 1)


def regularised(trainer: Any) -> None:
    """Let a trainer's loss have AdaLoRA's penalty: A and B orthogonal (section 3.1 of the paper).

    PEFT adds it to a loss that the model itself computes, which TRL's trainers do not ask for.
    """
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        found = inner(model, inputs, *rest, **options)
        if not model.training:
            return found
        extra = penalty(trainer.model)
        return (found[0] + extra, *found[1:]) if isinstance(found, tuple) else found + extra

    trainer.compute_loss = compute_loss


def penalty(model: Any) -> Tensor:
    """The mean over all A and B of how far they are from orthogonal, weighted."""
    found = []
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            rows = parameter if "lora_A" in name else parameter.T
            product = rows @ rows.T
            found.append(torch.linalg.norm(product - torch.eye(len(product)).to(product)))
    weight: float = model.peft_config["default"].orth_reg_weight
    return weight * torch.stack(found).mean()


@torch.no_grad()
def save_as_lora(model: Any, directory: Path) -> None:
    """Write an AdaLoRA PEFT model as a LoRA directory with patterns of rank and alpha."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    tensors, ranks = {}, {}
    config = model.peft_config["default"]
    for name, module in model.named_modules():
        if "default" not in getattr(module, "lora_E", {}):
            continue
        a, b, e = (getattr(module, part)["default"] for part in ("lora_A", "lora_B", "lora_E"))
        left = e.flatten() != 0
        factor = float(module.scaling["default"]) / (float(module.ranknum["default"]) + 1e-5)
        if not left.any():
            left[0] = True  # nothing is left of it: one direction of zeros, which all can load
        tensors[f"{name}.lora_A.weight"] = (a * e)[left].contiguous().cpu()
        tensors[f"{name}.lora_B.weight"] = (b[:, left] * factor).contiguous().cpu()
        ranks[name.removeprefix("base_model.model.")] = int(left.sum())
    most = max(ranks.values())
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        task_type="CAUSAL_LM",
        r=most,
        lora_alpha=most,
        lora_dropout=config.lora_dropout,
        target_modules=sorted(config.target_modules),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != most},
        alpha_pattern={name: rank for name, rank in ranks.items() if rank != most},
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    ).save_pretrained(str(directory))
