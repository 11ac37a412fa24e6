"""The random model that measurements of memory and speed load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks import memory
from mora_serve.config import BaseConfig
from mora_serve.model.loading import load_base


def test_transformers_and_the_server_read_the_same_model(tmp_path: Path) -> None:
    size = memory.write_model(tmp_path, memory.llama_config(128, 192, 2, 320))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    base = load_base(BaseConfig(str(tmp_path), quantization="none", dtype="bf16", device="cpu"))
    assert size == 2 * sum(p.numel() for p in model.parameters())
    assert torch.equal(
        model.model.embed_tokens.weight.bfloat16(),
        base.decoder.embedding.dequantise(torch.bfloat16),
    )
    assert torch.equal(
        model.lm_head.weight.bfloat16(), base.decoder.head.dequantise(torch.bfloat16)
    )


def test_unquantised_bytes_count_a_tied_head_once(tmp_path: Path) -> None:
    config = memory.llama_config(128, 192, 2, 320)
    memory.write_model(tmp_path, config)
    decoder = load_base(BaseConfig(str(tmp_path), dtype="fp32", device="cpu")).decoder
    norms, tables, table = (1 + 2 * 2) * 128 * 4, 2 * 2048 * 64 * 4, 320 * 128 * 4
    assert memory.unquantised_bytes(decoder) == norms + tables + 2 * table
    decoder.head = decoder.embedding
    assert memory.unquantised_bytes(decoder) == norms + tables + table
