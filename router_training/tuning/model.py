"""The base as transformers and PEFT train on it, in the precision that it is served in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import ModelShape
from router_training.tuning import ranks
from router_training.tuning.settings import TuneSettings, four_bit

ADALORA_STEPS = 6


def compute_type(settings: TuneSettings) -> torch.dtype:
    """What products are computed in: bfloat16 where the device is fast in it."""
    if settings.bf16 == "auto":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if settings.bf16 else torch.float32


def load(settings: TuneSettings, directory: Path) -> Any:
    """The causal language model of a directory: NF4 where it is trained on so, as it is served."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = compute_type(settings)
    options: dict[str, Any] = {"dtype": torch.float32 if settings.adapter == "full" else dtype}
    if settings.attn_implementation != "auto":
        options["attn_implementation"] = settings.attn_implementation
    elif settings.sample_packing:
        options["attn_implementation"] = "sdpa"
    if four_bit(settings) and not _is_four_bit(directory):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        )
    if not four_bit(settings) and _is_four_bit(directory):
        raise InvalidArgument(
            f"base_model: {settings.base_model!r} is stored in 4 bits, adapter: {settings.adapter} "
            "is on 16 or 32; take adapter: qlora, or another checkpoint",
            field="base_model",
        )
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.device())
        options["device_map"] = {"": ranks.device()}
    model = AutoModelForCausalLM.from_pretrained(str(directory), **options)
    _keep_layout(model)
    return model


def _keep_layout(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew where a CPU has AVX512-BF16.

    It does so in place, in the first pass in eval mode. Packed ones compute in bfloat16 whatever
    was asked for and let no gradient through: after an evaluation, training would go wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def peft_config(settings: TuneSettings, shape: ModelShape, steps: int) -> Any:
    """The adapter as PEFT makes it; ``steps`` are the whole run's, which AdaLoRA plans by."""
    from peft import AdaLoraConfig, EvaConfig, LoraConfig

    s = settings
    common: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "lora_alpha": int(s.lora_alpha) if s.lora_alpha.is_integer() else s.lora_alpha,
        "lora_dropout": s.lora_dropout,
        "target_modules": list(s.lora_target_modules),
    }
    if s.adalora:
        if steps < ADALORA_STEPS:
            raise InvalidArgument(
                f"adalora: it needs {ADALORA_STEPS} steps to move ranks in, this run has {steps}; "
                "give more rows, epochs or max_steps",
                field="adalora",
            )
        first = s.adalora_init_r or max(s.lora_r + 1, round(1.5 * s.lora_r))
        return AdaLoraConfig(
            **common,
            init_r=first,
            target_r=s.lora_r,
            tinit=max(1, steps // 10),
            tfinal=max(1, steps // 3),
            deltaT=max(1, steps // 50),
            total_step=steps,
        )
    started: dict[str, Any] = {}
    if s.peft_init_lora_weights == "eva":
        started = {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}
    elif s.peft_init_lora_weights == "gaussian":
        started = {"init_lora_weights": "gaussian"}
    return LoraConfig(
        **common,
        **started,
        r=s.lora_r,
        rank_pattern=dict(s.lora_rank_pattern),
        alpha_pattern=dict(s.lora_alpha_pattern),
        use_rslora=s.peft_use_rslora,
        use_dora=s.peft_use_dora,
    )


def masters_in_fp32(model: Any) -> int:
    """Put what is trained in fp32, where steps of 1e-5 still move it; how many parameters it is.

    Raises RuntimeError where nothing is trained.
    """
    count = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            count += parameter.numel()
    if not count:
        raise RuntimeError("no parameter is trained")
    return count


def _is_four_bit(directory: Path) -> bool:
    import json

    config = json.loads((directory / "config.json").read_text())
    return bool(config.get("quantization_config"))
