"""Write the base as transformers and bitsandbytes write a 4-bit model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from router_training.demo.tokenizer import build_tokenizer


def save_nf4(model: Any, directory: Path) -> None:
    """Quantise a transformers model to NF4 and save it with its tokenizer.

    ``model`` is left as it is. Projections become 4-bit, without double quantisation (whose
    nested statistics cannot be fused exactly); embeddings, head and norms are saved in fp32.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=False,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        quantised = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )
    # Saved before any forward: where the processor has AVX512-BF16 the first one in eval mode
    # repacks the codes in place.
    quantised.config.use_cache = True
    quantised.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)
    build_tokenizer(model.config.max_position_embeddings).save_pretrained(directory)
