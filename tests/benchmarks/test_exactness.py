"""``benchmarks.exactness``: the engine's logits beside PEFT's, through scheduler and pages."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from benchmarks import exactness, families, oracle


def test_logits_of_every_sampled_position_are_compared(tmp_path: Path) -> None:
    """With the forward that the configuration chooses; prompts come in several chunks."""
    model = families.make_base("llama3", tmp_path / "base")
    peft = oracle.make_adapters(copy.deepcopy(model), tmp_path / "adapters")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 320, (len(exactness.MIXTURES), 40), generator=generator)
    found = exactness.paged(tmp_path, peft, ids, tokens=2)
    assert 0 < found["paged_error"] < 1e-5
    assert found["chunked_prompts"] >= 10
