"""A new task's adapter: where it starts from, and that few rows teach it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.errors import InvalidArgument
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, MixedRow, row_losses, train_adapters
from router_training.batches import TokenRow
from router_training.peft_files import load_peft, save_peft
from router_training.shared import (
    NewTaskRecipe,
    TrialRecipe,
    best_start,
    train_new_task,
)
from router_training.starts import begin, copy_mean, low_rank

RECIPE = NewTaskRecipe(
    rank=4, alpha=8, steps=4, batch=8, warmup=2, lr=1e-2, trial=TrialRecipe(((2, 1),), batch=4)
)


def quiet(line):
    """Log nothing."""


def answering(token, count=8):
    """Rows whose answer is always this token."""
    return [TokenRow((97 + i, 98 + i, 99 + i), (token, 258)) for i in range(count)]


def mean_loss(base, adapter, rows):
    with torch.no_grad():
        mixed = [MixedRow(row, ((0, 1.0),)) for row in rows]
        return row_losses(base.decoder, adapter, mixed).mean().item()


def random_adapters(shape, count, rank, alpha=8.0, targets=("q_proj", "down_proj")):
    torch.manual_seed(count * rank)
    adapters = StackedAdapters(shape, count, rank, alpha, targets).requires_grad_(False)
    for b in adapters.b.values():
        b.normal_(0, 0.1)
    return adapters


def delta(adapters, layer, projection, index):
    a, b = adapters.projection(layer, projection, index)
    return adapters.alpha / adapters.rank * (b.T @ a)


@pytest.fixture(scope="module")
def shared(base):
    """Adapters that answer any prompt with A, B and C."""
    rows = [MixedRow(row, ((i, 1.0),)) for i in range(3) for row in answering(65 + i)]
    turns = iter(rows * 100)
    recipe = AdapterRecipe(rank=4, alpha=8, steps=8, rows=24, warmup=1, lr=2e-2, buckets=1)
    return train_adapters(base.decoder, 3, lambda: next(turns), recipe, lambda line: None)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
def test_low_rank_is_the_best_of_its_rank(parts, rank, seed):
    """What is left out is the product's smaller singular values, and nothing at full rank."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(parts, 9, generator=generator, dtype=torch.float64)
    b = torch.randn(parts, 7, generator=generator, dtype=torch.float64)
    small_a, small_b = low_rank(a, b, rank)
    values = torch.linalg.svdvals(b.T @ a)
    assert len(small_a) == len(small_b) == min(rank, parts, 7)
    left = torch.linalg.matrix_norm(b.T @ a - small_b.T @ small_a)
    torch.testing.assert_close(left, values[rank:].square().sum().sqrt(), atol=1e-9, rtol=1e-9)


def test_the_mean_is_that_of_the_deltas(base):
    """Rank 8 holds the mean of four rank-2 adapters exactly, whatever the two alphas."""
    shared = random_adapters(base.shape, 4, 2, alpha=6.0)
    new = StackedAdapters(base.shape, 1, 8, 8.0, ("q_proj",)).requires_grad_(False)
    copy_mean(shared, range(4), new)
    for layer in range(base.shape.layers):
        deltas = [delta(shared, layer, "q_proj", i) for i in range(4)]
        torch.testing.assert_close(
            delta(new, layer, "q_proj", 0), torch.stack(deltas).mean(0), atol=1e-5, rtol=1e-4
        )


def test_layer_scales_of_the_set_count(base):
    """An adapter that is served at half its delta in a layer gives half of it to the mean."""
    shared = random_adapters(base.shape, 1, 2)
    shared.scales = torch.nn.Parameter(torch.ones(1, base.shape.layers), requires_grad=False)
    shared.scales[0, 1] = 0.5
    new = StackedAdapters(base.shape, 1, 2, 8.0, ("q_proj",)).requires_grad_(False)
    copy_mean(shared, [0], new)
    for layer, scale in ((0, 1.0), (1, 0.5)):
        torch.testing.assert_close(
            delta(new, layer, "q_proj", 0),
            scale * delta(shared, layer, "q_proj", 0),
            atol=1e-5,
            rtol=1e-4,
        )


def test_ranks_beyond_the_mean_can_still_learn(base):
    """A start of lower rank leaves the other rows of A random: two zeros would have no gradient."""
    new = StackedAdapters(base.shape, 1, 8, 8.0, ("q_proj",)).requires_grad_(False)
    copy_mean(random_adapters(base.shape, 1, 2), [0], new)
    a, b = new.projection(0, "q_proj", 0)
    assert a.abs().amax(1).min() > 0
    assert torch.equal(b[2:], torch.zeros_like(b[2:]))
    assert b[:2].abs().amax(1).min() > 0


def test_a_start_is_put_in_its_place(base):
    """One adapter of the set, or the mean, at the place asked for; chance changes nothing."""
    shared = random_adapters(base.shape, 3, 4, targets=("q_proj",))
    new = StackedAdapters(base.shape, 3, 4, 8.0, ("q_proj",)).requires_grad_(False)
    before = [new.projection(0, "q_proj", 0)[0].clone(), delta(new, 0, "q_proj", 1)]
    begin(new, 0, shared, "random")
    begin(new, 2, shared, 1)
    assert torch.equal(new.projection(0, "q_proj", 0)[0], before[0])
    assert torch.equal(delta(new, 0, "q_proj", 1), before[1])
    torch.testing.assert_close(delta(new, 0, "q_proj", 2), delta(shared, 0, "q_proj", 1))


@pytest.mark.parametrize("most", [3, 1], ids=["all are tried", "the nearest is"])
def test_the_best_start_is_the_adapter_of_the_same_answer(base, shared, most):
    """Rows answered with B lead to the adapter that answers B, whatever the set's order."""
    for index in range(3):
        trial = TrialRecipe(rounds=((2, 2), (2, 1)), batch=4, most=most)
        recipe = replace(RECIPE, trial=trial)
        found = best_start(base.decoder, answering(65 + index), shared, recipe, quiet)
        assert found == index


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_warm_up_may_be_one_step_or_none(base, shared, warmup):
    """The trial warms up for half as many steps: for these, not at all."""
    recipe = replace(RECIPE, warmup=warmup)
    assert best_start(base.decoder, answering(66), shared, recipe, quiet) == 1
    train_new_task(base.decoder, answering(66), recipe, shared, 1, quiet)


@pytest.mark.parametrize(("most", "tried"), [(3, 5), (1, 3)])
def test_of_a_large_set_only_some_are_tried(base, shared, most, tried):
    """Beside chance and the mean; the nearest of the set is among them."""
    lines = []
    recipe = replace(RECIPE, trial=TrialRecipe(rounds=((1, 9),), batch=4, most=most))
    best_start(base.decoder, answering(66), shared, recipe, lines.append)
    names = [part.split()[0] for part in lines[-1].removeprefix("starts: ").split(", ")]
    assert len(names) == tried
    assert {"random", "mean", "1"} <= set(names)


def test_starts_are_judged_by_rows_that_they_did_not_learn_from(base, shared, monkeypatch):
    """What is trained on and what is judged by have no row in common, and are all rows."""
    learnt, judged = set(), set()

    def train(decoder, count, draw, *rest, **options):
        learnt.update(draw().tokens for _ in range(200))
        return train_adapters(decoder, count, draw, *rest, **options)

    def losses(decoder, adapters, rows):
        judged.update(row.tokens for row in rows)
        return row_losses(decoder, adapters, rows)

    monkeypatch.setattr("router_training.shared.train_adapters", train)
    monkeypatch.setattr("router_training.shared.row_losses", losses)
    rows = answering(66, count=12)
    best_start(base.decoder, rows, shared, RECIPE, quiet)
    assert learnt.isdisjoint(judged)
    assert learnt | judged == set(rows)


def test_too_few_rows_for_a_trial_take_the_mean(base, shared):
    """Three rows cannot be parted into some to learn from and some to judge by."""
    assert best_start(base.decoder, answering(65, 3), shared, RECIPE, quiet) == "mean"


@pytest.mark.parametrize("start", [None, "mean"], ids=["the best", "the mean"])
def test_a_start_from_the_set_is_ahead(base, shared, start):
    """From the set, a few steps on rows of a known answer get further than from chance."""
    rows = answering(66, count=6)
    losses = [
        mean_loss(base, train_new_task(base.decoder, rows, RECIPE, shared, way, quiet), rows)
        for way in ("random", start)
    ]
    assert losses[1] < losses[0] - 0.1


def test_few_rows_teach_a_new_task_and_leave_the_set_alone(base, shared):
    """Training lowers the loss on a new answer; the set stays bit for bit."""
    before = [p.clone() for p in shared.parameters()]
    rows = answering(90)
    new = train_new_task(base.decoder, rows, RECIPE, shared, "mean", quiet)
    start = StackedAdapters(base.shape, 1, 4, 8.0).requires_grad_(False)
    copy_mean(shared, range(3), start)
    assert mean_loss(base, new, rows) < mean_loss(base, start, rows) - 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, shared.parameters(), strict=True))


def test_without_a_set_training_starts_at_random(base):
    """No set and the start "random" are the same, and follow the seed."""
    rows = answering(70)
    one = train_new_task(base.decoder, rows, RECIPE, log=quiet)
    two = train_new_task(
        base.decoder, rows, RECIPE, random_adapters(base.shape, 2, 2), "random", quiet
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_new_adapter_is_one_peft_directory(base, shared, tmp_path):
    """Saved and loaded again, it needs no set and gives the same losses as before."""
    rows = answering(66)
    new = train_new_task(base.decoder, rows, RECIPE, shared, 1, quiet)
    save_peft(new, 0, tmp_path / "new")
    again = load_peft(base.shape, [tmp_path / "new"])
    assert mean_loss(base, again, rows) == pytest.approx(mean_loss(base, new, rows), rel=2e-2)


def test_no_rows_are_refused(base):
    """The error names the field."""
    with pytest.raises(InvalidArgument, match="rows") as caught:
        train_new_task(base.decoder, [], RECIPE)
    assert caught.value.field == "rows"


def test_a_set_without_a_target_is_refused(base):
    """A projection that the set does not adapt cannot start from it."""
    shared = random_adapters(base.shape, 2, 2, targets=("q_proj",))
    with pytest.raises(InvalidArgument, match="down_proj"):
        train_new_task(base.decoder, answering(65), RECIPE, shared)
