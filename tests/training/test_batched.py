"""The batched adapter trainer: it learns, keeps adapters apart, and writes what PEFT reads."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from mora_serve.model.lora import StackedAdapters
from router_training.batched import (
    AdapterRecipe,
    MixedRow,
    batch_hidden,
    load_peft,
    mixture_weights,
    row_losses,
    save_peft,
    train_adapters,
)
from router_training.batches import TokenRow, bucketed, collate

RECIPE = AdapterRecipe(rank=4, alpha=8, steps=6, rows=16, warmup=1, lr=2e-2)


def rows_for(*adapters, seed=0):
    """Each adapter is to answer any prompt with a token of its own."""
    rng = random.Random(seed)

    def draw():
        adapter = rng.choice(adapters)
        prompt = tuple(rng.randrange(97, 123) for _ in range(rng.randint(3, 9)))
        return MixedRow(TokenRow(prompt, (65 + adapter, 258)), ((adapter, 1.0),))

    return draw


def mean_loss(base, adapters, draw):
    with torch.no_grad():
        return row_losses(base.decoder, adapters, [draw() for _ in range(32)]).mean().item()


@pytest.fixture(scope="module")
def trained(base):
    return train_adapters(base.decoder, 3, rows_for(0, 2), RECIPE, lambda line: None)


def test_a_few_steps_lower_the_loss(base, trained):
    """Two adapters learn at once, each its own answer."""
    torch.manual_seed(RECIPE.seed)
    untrained = StackedAdapters(base.shape, 3, RECIPE.rank, RECIPE.alpha)
    for adapter in (0, 2):
        before = mean_loss(base, untrained, rows_for(adapter, seed=1))
        assert mean_loss(base, trained, rows_for(adapter, seed=1)) < before - 1


def test_rows_move_only_their_own_adapters(base, trained):
    """The adapter that no row used is, bit for bit, as it was initialised; the others moved."""
    torch.manual_seed(RECIPE.seed)
    initial = StackedAdapters(base.shape, 3, RECIPE.rank, RECIPE.alpha)
    for index, moved in ((0, True), (1, False), (2, True)):
        before, after = initial.export(index), trained.export(index)
        equal = [torch.equal(before[k], after[k]) for k in before]
        assert not any(equal) if moved else all(equal)


def test_training_follows_its_seed(base):
    """The same seed and rows give the same adapters."""
    short = AdapterRecipe(rank=2, alpha=4, steps=2, rows=8)
    a, b = (
        train_adapters(base.decoder, 2, rows_for(0, 1), short, lambda line: None) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_row_losses_do_not_see_the_batch(base, trained):
    """A row's loss is the same alone, padded, and beside rows of other adapters."""
    draw = rows_for(0, 2, seed=4)
    rows = sorted((draw() for _ in range(8)), key=lambda r: len(r.tokens))
    together = row_losses(base.decoder, trained, rows)
    alone = torch.cat([row_losses(base.decoder, trained, [r]) for r in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_mixtures_become_a_matrix():
    """A row a mixture, a column an adapter; an adapter named twice counts twice."""
    tokens = TokenRow((1,), (2,))
    mixtures = (((2, 0.5),), ((0, 1.0), (0, 0.25)), ())
    assert mixture_weights([MixedRow(tokens, m) for m in mixtures], 3).tolist() == [
        [0, 0, 0.5],
        [1.25, 0, 0],
        [0, 0, 0],
    ]


def test_peft_loads_what_is_exported(base, base_directory, trained, tmp_path):
    """PEFT's model with the exported adapter gives the stacked form's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save_peft(trained, 2, tmp_path / "two", "some base")
    batch = collate([TokenRow(tuple(b"reverse 'kavo'"), (258,)), TokenRow(tuple(b"hm"), (258,))])
    stacked = load_peft(base.shape, [tmp_path / "two"])
    with torch.no_grad():
        hidden = batch_hidden(base.decoder, batch, stacked, torch.ones(2, 1))
        ours = base.decoder.logits(hidden).view(2, -1, base.shape.vocab_size)
        plain = base.decoder.logits(batch_hidden(base.decoder, batch)).view_as(ours)
        model = AutoModelForCausalLM.from_pretrained(str(base_directory), device_map="cpu")
        theirs = PeftModel.from_pretrained(model, str(tmp_path / "two")).eval()(batch.inputs).logits
        trained_hidden = batch_hidden(base.decoder, batch, trained, torch.tensor([[0, 0, 1.0]] * 2))
        exact = base.decoder.logits(trained_hidden).view_as(ours)
    real = batch.prompt + batch.answer > 0
    assert (ours - plain)[real].norm() > 0.1 * plain[real].norm()
    assert (ours - theirs)[real].norm() < 2e-2 * theirs[real].norm()
    assert (ours - exact)[real].norm() < 2e-2 * exact[real].norm()


def test_adapters_that_differ_in_rank_do_not_stack(base, tmp_path):
    """Stacking saved adapters of two ranks is an error that names what differs."""
    for rank in (2, 4):
        save_peft(StackedAdapters(base.shape, 1, rank, 8), 0, tmp_path / str(rank))
    with pytest.raises(ValueError, match="rank"):
        load_peft(base.shape, [tmp_path / "2", tmp_path / "4"])


def test_buckets_hold_rows_of_similar_length():
    """Every row drawn comes out once; a batch's lengths never interleave with another's."""
    rng = random.Random(0)
    drawn = []

    def draw():
        drawn.append(rng.randint(1, 1000))
        return drawn[-1]

    batches = bucketed(draw, lambda n: n, 5, random.Random(1), buckets=4)
    four = [next(batches) for _ in range(4)]
    assert sorted(n for b in four for n in b) == sorted(drawn)
    ordered = sorted(four, key=lambda b: b[0])
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(ordered))
