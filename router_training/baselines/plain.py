"""What PEFT's routers run on: a transformers copy of the base, and exact match through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from router_training.batches import TokenBatch, TokenRow, chunks, collate
from router_training.evaluation.cases import Case
from router_training.evaluation.metrics import Array

Encode = Callable[[Case], TokenRow]
"""A case's prompt, as the base is to see it, and its answer, as tokens."""


def plain_model(directory: Path) -> Any:
    """A transformers causal model of the base with its weights in fp32.

    4-bit ones are written out, the same numbers: X-LoRA swaps no 4-bit layers.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, device_map="cpu"
    )
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    model.config.use_cache = False
    return model.eval()


@torch.no_grad()
def exact_match(model: Any, rows: Sequence[TokenRow]) -> Array:
    """1.0 where every token of the answer is the likeliest one [n].

    What greedy generation would answer: these routers weigh a token by what stands before it.
    """
    found = np.zeros(len(rows))
    for at, batch in batches(rows):
        found[at] = batch.right(model(input_ids=batch.inputs).logits).numpy()
    return found


def batches(rows: Sequence[TokenRow], size: int = 24) -> Iterator[tuple[list[int], TokenBatch]]:
    """Rows of similar length together: their positions, and the batch."""
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for at in chunks(by_length, size):
        yield list(at), collate([rows[i] for i in at])


def prompt_mean(weights: Tensor, batch: TokenBatch) -> Tensor:
    """The mean over a row's prompt tokens [B, a] of weights [B, L, a]."""
    # The last prompt token is an input too: it predicts the answer's first.
    mask = torch.zeros_like(batch.prompt)
    lengths = batch.prompt.sum(1).long() + 1
    for row, length in zip(mask, lengths.tolist(), strict=True):
        row[:length] = 1
    return (weights * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
