"""Measuring how adapters compose, on models whose answers are known."""

from __future__ import annotations

import pytest
import torch

from mora_serve.config import BaseConfig
from mora_serve.model.loading import load_base
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import MixedRow
from router_training.batches import TokenRow
from router_training.demo.adapters import MixingRecipe, mixed_rows
from router_training.demo.base import build_model
from router_training.demo.composition import Composition, exact_matches
from router_training.demo.nf4 import save_nf4
from router_training.demo.pairs import HELD_OUT_PAIRS, TRAINED_PAIRS
from router_training.demo.tasks import TASKS
from router_training.generation import greedy

NAMES = tuple(TASKS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "nf4"
    save_nf4(build_model(0), directory)
    return load_base(BaseConfig(str(directory), dtype="fp32", device="cpu"))


@pytest.fixture(scope="module")
def adapters(base):
    torch.manual_seed(0)
    adapters = StackedAdapters(base.shape, len(NAMES), 2, 4.0).requires_grad_(False)
    for b in adapters.b.parameters():
        b.normal_(0, 0.2)
    return adapters


def test_a_row_counts_when_greedy_generation_gives_its_answer(base, adapters):
    """Teacher-forced and generated answers agree, right and wrong ones."""
    prompt = (257, 259, *b"reverse 'kavo'", 261)
    mixture = ((0, 1.0), (3, 0.5))
    weights = torch.zeros(1, len(NAMES))
    for adapter, weight in mixture:
        weights[0, adapter] = weight
    (answer,) = greedy(base.decoder, [prompt], (), 6, adapters, weights)
    wrong = [*answer[:3], (answer[3] + 1) % 320, *answer[4:]]
    rows = [MixedRow(TokenRow(prompt, tuple(a)), mixture) for a in (answer, wrong)]
    assert exact_matches(base.decoder, adapters, rows) == [True, False]


def test_every_cell_is_measured(base, adapters):
    """Singles, trained and held-out pairs each have a figure; random adapters are right nowhere."""
    found = Composition(base.decoder, adapters, 7, prompts=1).measure()
    assert set(found["singles"]) == set(NAMES)
    assert set(found["pairs_trained"]) == {"+".join(p) for p in TRAINED_PAIRS}
    assert set(found["pairs_held_out"]) == {"+".join(p) for p in HELD_OUT_PAIRS}
    assert found["pairs_least"] == found["best_single"] == found["three_way"] == 0


def test_training_rows_keep_held_out_pairs_apart():
    """Rows have one task or a trained pair near weight 1, and at times a light wrong adapter."""
    draw = mixed_rows(MixingRecipe(jitter=0.2), 0)
    kinds = set()
    for _ in range(3000):
        mixture = draw().mixture
        right = tuple(NAMES[i] for i, w in mixture if w > 0.5)
        wrong = [w for _, w in mixture if w <= 0.5]
        assert all(0.8 <= w <= 1.2 for _, w in mixture if w > 0.5)
        assert len(wrong) <= 1
        assert all(w <= 0.3 for w in wrong)
        assert len(right) == 1 or right in TRAINED_PAIRS
        kinds.add((len(right), len(wrong)))
    assert kinds == {(1, 0), (1, 1), (2, 0), (2, 1)}
