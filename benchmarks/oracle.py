"""Adapters made by PEFT, and what PEFT and the formula say that a mixture of them gives.

The references share no code with the server: PEFT's own forward for one adapter, its ``cat``
combination for mixtures of plain LoRA, and the formula by hand (hooks on the base's linears) where
PEFT has no exact answer: rsLoRA in a mixture, several DoRA adapters at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Every kind of adapter that the server says it takes. (None may be called "mlp": PEFT drops the
# modules of that name from all others when it saves.)
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    **{f"rank-{r}": {"r": r, "lora_alpha": 2 * r} for r in (1, 2, 4, 8, 16, 32, 64)},
    "attention": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "feed-forward": {"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "down_proj"]},
    "one-layer": {"r": 8, "lora_alpha": 32, "layers_to_transform": [1]},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 12},
        "alpha_pattern": {"v_proj": 24, "layers.0.self_attn.o_proj": 4},
    },
    "rslora": {"r": 16, "lora_alpha": 16, "use_rslora": True},
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True},
    "dora-2": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
}


def make_adapters(
    model: Any,
    directory: Path,
    variants: Mapping[str, Mapping[str, Any]] = VARIANTS,
    strength: float = 0.6,
) -> Any:
    """Wrap ``model`` in a PeftModel that holds every variant, and save each to its directory.

    ``strength`` is the typical norm of a delta against its base weight's.
    """
    from peft import LoraConfig, PeftModel

    peft: PeftModel | None = None
    for i, (name, options) in enumerate(variants.items()):
        # PEFT seeds nothing: without this, two "different" adapters may be the same.
        torch.manual_seed(1000 + i)
        config = LoraConfig(**{"target_modules": PROJECTIONS, "bias": "none", **options})
        if peft is None:
            peft = PeftModel(model, config, adapter_name=name)
        else:
            peft.add_adapter(name, config)
        for module in peft.modules():
            if not hasattr(module, "lora_B") or name not in module.lora_B:
                continue
            a, b = module.lora_A[name].weight.data, module.lora_B[name].weight.data
            b.normal_()
            delta = (b @ a).norm() * abs(module.scaling[name])
            b.mul_(strength * module.get_base_layer().weight.norm() / delta)
            if name in (getattr(module, "lora_magnitude_vector", None) or {}):
                m = module.lora_magnitude_vector[name].weight.data
                m.mul_(torch.rand_like(m) + 0.5)
        peft.save_pretrained(str(directory), selected_adapters=[name])
    assert peft is not None
    return peft.eval()


@torch.no_grad()
def cat_logits(peft: Any, mixture: Mapping[str, float], ids: Tensor) -> Tensor:
    """PEFT's exact combination of plain LoRA adapters."""
    peft.base_model.add_weighted_adapter(
        list(mixture), list(mixture.values()), "mixed", combination_type="cat"
    )
    peft.set_adapter("mixed")
    logits: Tensor = peft(input_ids=ids).logits
    peft.delete_adapter("mixed")
    return logits


@contextmanager
def by_hand(peft: Any, mixture: Mapping[str, float]) -> Iterator[Any]:
    """The model with y = Wx + bias + sum of weighted deltas, by the formula, in its linears."""
    hooks = []
    for module in peft.modules():
        if hasattr(module, "lora_B"):
            held = {n: w for n, w in mixture.items() if n in module.lora_B}
            if held:
                base = module.get_base_layer()
                hooks.append(base.register_forward_hook(_delta_hook(module, held)))
    with peft.disable_adapter():
        try:
            yield peft
        finally:
            for hook in hooks:
                hook.remove()


def _delta_hook(module: Any, mixture: Mapping[str, float]) -> Any:
    def hook(base: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        plain = x @ base.weight.T
        for name, weight in mixture.items():
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            delta = module.scaling[name] * (x @ a.T @ b.T)
            if name in (getattr(module, "lora_magnitude_vector", None) or {}):
                merged = base.weight + module.scaling[name] * (b @ a)
                c = module.lora_magnitude_vector[name].weight / merged.norm(dim=1)
                delta = (c - 1) * plain + c * delta
            output = output + weight * delta
        return output

    return hook


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """``count`` greedy tokens of a transformers or PEFT model, end tokens taken as any other."""
    out = generated(model, torch.tensor([prompt]), count)
    return [int(t) for t in out[0, len(prompt) :]]


def generated(model: Any, ids: Tensor, count: int, **options: Any) -> Tensor:
    """``ids`` [rows, prompt] followed by ``count`` greedy tokens; see ``generate`` for options."""
    out: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return out
