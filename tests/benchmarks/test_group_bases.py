"""The measurement of GPTQ and AWQ bases, on two of its variants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import group_bases
from mora_serve.model.native.library import targets


@pytest.mark.parametrize("name", ["gptq-act-order", "awq-folded"])
def test_logits_and_adapters_are_those_of_transformers_and_peft(tmp_path: Path, name: str) -> None:
    """On the path that serves it; far nearer than the claim says."""
    row = group_bases.measure(tmp_path, name, "cpu", "fp32", 12)
    assert row["logits"] < 1e-5
    assert row["wrong_tokens"] == 0
    assert row["tokens"] == 12 * len(group_bases.MIXTURES)
    assert row["quantization"] == f"{name[:4].rstrip('-')}-int4"
    if targets(torch.float32):
        assert row["forward"] == "NativeForward"


class Constant:
    """A model that finds token 5 likeliest, 6 nearly so, at every place."""

    def __call__(self, input_ids: torch.Tensor) -> Constant:
        self.logits = torch.zeros(*input_ids.shape, 9)
        self.logits[..., 5], self.logits[..., 6] = 10.0, 9.995
        return self


@pytest.mark.parametrize(("answer", "wrong"), [([5, 5], 0), ([5, 6], 0), ([5, 7], 1), ([1, 2], 2)])
def test_tokens_that_are_nearly_the_likeliest_are_right(answer: list[int], wrong: int) -> None:
    assert group_bases.wrong_tokens(Constant(), [3, 3, 3], answer) == wrong


def test_the_largest_error_of_each_method_counts() -> None:
    rows = [
        {"quantization": "gptq-int4", "logits": 1e-3, "wrong_tokens": 0},
        {"quantization": "gptq-int8", "logits": 2e-3, "wrong_tokens": 3},
        {"quantization": "awq-int4", "logits": 5e-3, "wrong_tokens": 1},
    ]
    assert group_bases.summary(rows) == {
        "gptq_logits": 2e-3,
        "awq_logits": 5e-3,
        "wrong_tokens": 4,
    }
