"""What settings ask of the machine: libraries that are not installed are named before a run."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from mora_serve.errors import InvalidArgument
from router_training.tuning.settings import TuneSettings


def check_machine(settings: TuneSettings) -> None:
    """Raises InvalidArgument for a setting that this machine cannot fulfil."""
    needed = [("report_to", name, name) for name in settings.report_to]
    if settings.attn_implementation == "flash_attention_2":
        needed.append(("attn_implementation", "flash_attn", "flash-attn"))
    if settings.liger_kernel:
        needed.append(("liger_kernel", "liger_kernel", "liger-kernel"))
    if settings.general_tasks:
        needed.append(("general_tasks", "lm_eval", "'mora-serve[eval]'"))
    if "bleu" in settings.metrics:
        needed.append(("metrics", "sacrebleu", "sacrebleu"))
    for key, module, package in needed:
        if find_spec(module) is None:
            raise InvalidArgument(
                f"{key}: {module} is not installed; pip install {package}, or leave it out",
                field=key,
            )
    cards = {
        "attn_implementation": settings.attn_implementation == "flash_attention_2",
        "liger_kernel": settings.liger_kernel,
    }
    for key, wanted in cards.items():
        if wanted and not torch.cuda.is_available():
            raise InvalidArgument(f"{key}: it needs a CUDA device; leave it out", field=key)
