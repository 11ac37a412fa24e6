"""Adapters as other trainers write them: PEFT does the saving, their own code what surrounds it.

Each function here repeats what the named source does between ``LoraConfig`` and the finished
directory, on a small random base. Versions and files:

- Unsloth v0.1.801-beta (015bdef), ``unsloth/models/llama.py`` and ``vision.py``
  (``get_peft_model``); unsloth-zoo ce232d6, ``hf_utils.py`` (``fix_lora_auto_mapping``),
  ``peft_utils.py`` (``get_peft_regex``). https://github.com/unslothai/unsloth
- Axolotl v0.18.0 (067b021), ``src/axolotl/loaders/adapter.py``, ``train.py``,
  ``integrations/kernels/merge_aware_callback.py``. https://github.com/axolotl-ai-cloud/axolotl
- LLaMA-Factory v0.9.5 (ff6d4d1), ``src/llamafactory/model/adapter.py``, ``train/callbacks.py``
  (``PissaConvertCallback``). https://github.com/hiyouga/LLaMA-Factory
- TRL and PEFT: those installed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomised(model: Any, seed: int = 0) -> Any:
    """A PEFT model whose adapter does something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                parameter.normal_(0, 0.2)
            elif "lora_magnitude_vector" in key:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def lora(base: Any, **options: Any) -> Any:
    """PEFT's model of a copy of the base."""
    from peft import LoraConfig, get_peft_model

    return randomised(get_peft_model(copy.deepcopy(base), LoraConfig(**options)))


def tokenizer_files(base_directory: Path, out: Path) -> None:
    """What every trainer saves beside the adapter."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(base_directory).save_pretrained(out)


def checkpoint(model: Any, out: Path) -> None:
    """A checkpoint of transformers' Trainer: the adapter and what a run goes on from."""
    model.save_pretrained(out)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": 1}, out / name)
    (out / "trainer_state.json").write_text(json.dumps({"global_step": 2}))


def unsloth(base: Any, base_directory: Path, out: Path) -> Any:
    """``FastLanguageModel.get_peft_model``, then ``save_pretrained`` of model and tokenizer."""
    model = lora(
        base,
        r=8,
        lora_alpha=16,
        target_modules=SEVEN,
        lora_dropout=0,
        bias="none",
        task_type="CAUSAL_LM",
        layers_to_transform=None,
        init_lora_weights=True,
        loftq_config={},
        use_rslora=True,
        modules_to_save=None,
        target_parameters=None,
        ensure_weight_tying=False,
    )
    _unsloth_mapping(model)
    model.save_pretrained(out)
    tokenizer_files(base_directory, out)
    return model


def unsloth_by_layers(base: Any, base_directory: Path, out: Path) -> Any:
    """``FastModel.get_peft_model`` with ``finetune_*`` flags: the targets are one expression."""
    leaves = "|".join(SEVEN)
    parts = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer"
    expression = (
        rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{parts}).*?(?:{leaves}))"
        rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{parts})\.(?:(?:{leaves})))"
    )
    model = lora(base, r=4, lora_alpha=4, target_modules=expression, task_type="CAUSAL_LM")
    _unsloth_mapping(model)
    model.save_pretrained(out)
    tokenizer_files(base_directory, out)
    return model


def _unsloth_mapping(model: Any) -> None:
    inner = model.get_base_model().__class__
    model.peft_config["default"].auto_mapping = {
        "base_model_class": inner.__name__,
        "parent_library": inner.__module__,
        "unsloth_fixed": True,
    }


def axolotl(base: Any, base_directory: Path, out: Path) -> Any:
    """``lora_target_linear: true`` with patterns, the configuration saved before the weights."""
    linear = {
        name.rpartition(".")[2]
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear)
    } - {"lm_head"}
    model = lora(
        base,
        r=8,
        lora_alpha=16,
        target_modules=list(linear),
        target_parameters=[],
        layers_to_transform=None,
        layers_pattern=None,
        lora_dropout=0.05,
        fan_in_fan_out=None,
        modules_to_save=None,
        exclude_modules=None,
        bias="none",
        task_type="CAUSAL_LM",
        rank_pattern={"q_proj": 4},
        alpha_pattern={"down_proj": 32},
    )
    _axolotl_directory(model, base, base_directory, out)
    return model


def axolotl_dora(base: Any, base_directory: Path, out: Path) -> Any:
    """``peft_use_dora: true``, and the note that merge-aware training leaves."""
    model = lora(
        base,
        r=4,
        lora_alpha=8,
        target_modules=SEVEN,
        target_parameters=[],
        lora_dropout=0.0,
        fan_in_fan_out=None,
        bias="none",
        task_type="CAUSAL_LM",
        use_dora=True,
    )
    _axolotl_directory(model, base, base_directory, out)
    file = out / "adapter_config.json"
    note = {"scale_mode": "fresh", "pts_policy": "base_fused_max", "encoder": None, "start_step": 0}
    settings = json.loads(file.read_text()) | {"nvfp4_merge_aware": note}
    file.write_text(json.dumps(settings, indent=2))
    return model


def _axolotl_directory(model: Any, base: Any, base_directory: Path, out: Path) -> None:
    checkpoint(model, out / "checkpoint-10")
    base.config.save_pretrained(out)
    model.save_pretrained(out)
    tokenizer_files(base_directory, out)
    torch.save({"args": 1}, out / "training_args.bin")
    (out / "debug.log").write_text("[INFO] started\n")


def llama_factory(base: Any, base_directory: Path, out: Path) -> Any:
    """``finetuning_type: lora`` with ``lora_target: all``, metrics and a picture beside it."""
    model = lora(
        base,
        task_type="CAUSAL_LM",
        inference_mode=False,
        r=8,
        target_modules=SEVEN,
        lora_alpha=16,
        lora_dropout=0.0,
        use_rslora=False,
        use_dora=False,
        modules_to_save=None,
    )
    checkpoint(model, out / "checkpoint-2")
    model.save_pretrained(out)
    tokenizer_files(base_directory, out)
    torch.save({"args": 1}, out / "training_args.bin")
    for name in ("all_results.json", "train_results.json", "trainer_state.json"):
        (out / name).write_text("{}")
    (out / "trainer_log.jsonl").write_text('{"current_steps": 1}\n')
    (out / "Modelfile").write_text("FROM .\n")
    (out / "training_loss.png").write_bytes(b"\x89PNG")
    return model


def llama_factory_pissa(base: Any, base_directory: Path, out: Path) -> Any:
    """``pissa_init`` and ``pissa_convert``: three folders, of which one can be served."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=SEVEN, init_lora_weights="pissa")
    model = get_peft_model(copy.deepcopy(base), config)
    settings = model.peft_config["default"]

    def as_plain(folder: str) -> None:
        settings.init_lora_weights = True
        model.save_pretrained(out / folder)
        settings.init_lora_weights = "pissa"

    as_plain("pissa_init")
    with torch.no_grad():  # what training would do
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    as_plain("pissa_backup")
    model.save_pretrained(
        out / "pissa_converted", path_initial_model_for_weight_conversion=str(out / "pissa_init")
    )
    return model.eval()


def trl(base: Any, base_directory: Path, out: Path) -> Any:
    """A run of the installed ``SFTTrainer``: two steps, a checkpoint, ``save_model``."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [{"text": chr(97 + i) * 24} for i in range(4)]
    trainer = SFTTrainer(
        model=copy.deepcopy(base),
        args=SFTConfig(
            output_dir=str(out),
            max_steps=2,
            save_steps=1,
            per_device_train_batch_size=2,
            learning_rate=1.0,
            max_length=32,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataset_num_proc=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base_directory),
        peft_config=LoraConfig(
            r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


TRAINERS: dict[str, Callable[[Any, Path, Path], Any]] = {
    "unsloth": unsloth,
    "unsloth-by-layers": unsloth_by_layers,
    "axolotl": axolotl,
    "axolotl-dora": axolotl_dora,
    "llama-factory": llama_factory,
    "trl": trl,
}
