"""The measurement of int8 adapters: what it compares, and a few of its prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import int8_adapters
from benchmarks.int8_adapters import Answers

ONES = torch.ones(3, 5)


def answer(ids: list[int], logits: torch.Tensor = ONES) -> Answers:
    return Answers([ids], [logits[: len(ids)]], [str(ids)], 1)


@pytest.mark.parametrize(
    ("other", "alike"), [([7, 8, 9], 3), ([7, 8, 5], 3), ([7, 5, 9], 2), ([5, 8, 9], 1), ([7], 1)]
)
def test_tokens_count_up_to_the_first_that_differs(other: list[int], alike: int) -> None:
    """That one was chosen after the same tokens; those behind it were not."""
    assert answer([7, 8, 9]).read_alike(answer(other), 0) == alike


def test_what_is_behind_a_token_that_differs_is_no_error() -> None:
    spoiled = ONES.clone()
    spoiled[2] = 100
    assert answer([7, 8, 9]).error(answer([7, 5, 9], spoiled), 0) == 0
    assert answer([7, 8, 9]).error(answer([7, 8, 9], spoiled), 0) > 10


def test_a_few_prompts_of_the_demo_keep_their_answers() -> None:
    """But not their logits: the adapters are rounded."""
    prompts = int8_adapters.demo(1)
    few = slice(0, None, 10)
    found = int8_adapters.measure(
        replace(prompts, asked=prompts.asked[few], wanted=prompts.wanted[few])
    )
    assert found["prompts"] == len(prompts.asked[few]) >= 5
    assert found["tokens"] > found["prompts"]
    assert 1e-5 < found["logits_error_mean"] <= found["logits_error_worst"] < 0.01
    assert found["right_exact"] >= 0.8
    assert abs(found["right_lost"]) <= 0.2
