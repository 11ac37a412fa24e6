"""The batched adapter trainer: it learns, keeps adapters apart, and writes what PEFT reads."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mora_serve.adapters.peft_config import parse_config
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import PROJECTIONS, projection_path
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import (
    AdapterRecipe,
    MixedRow,
    batch_hidden,
    mixture_weights,
    parts,
    row_losses,
    train_adapters,
)
from router_training.batches import TokenRow, bucketed, collate
from router_training.peft_files import load_peft, save_peft

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


@pytest.fixture
def apart(base, tmp_path):
    """Three directories that differ in rank, alpha, targets, patterns and rank-stabilisation."""
    directories = []
    for i, (rank, alpha, targets) in enumerate(
        [(2, 8, PROJECTIONS), (4, 4, ("q_proj", "v_proj", "down_proj")), (4, 6, PROJECTIONS)]
    ):
        torch.manual_seed(i)
        one = StackedAdapters(base.shape, 1, rank, alpha, targets, layer_scales=i == 2)
        for b in one.b.parameters():
            torch.nn.init.normal_(b, std=0.1)
        if one.scales is not None:
            torch.nn.init.uniform_(one.scales, -1.5, 1.5)
        directories.append(tmp_path / str(i))
        save_peft(one, 0, directories[-1], "some base")
    config = directories[1] / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": false', '"use_rslora": true'))
    return directories


def test_what_is_stacked_computes_what_peft_computes(base, base_directory, apart):
    """Each adapter alone and a mixture, in one batch, against PEFT's model (bf16 products)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    batch = collate([TokenRow(tuple(b"reverse 'kavo'"), (258,))] * 4)
    weights = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])
    with torch.no_grad():
        hidden = batch_hidden(base.decoder, batch, load_peft(base.shape, apart), weights)
        ours = base.decoder.logits(hidden).view(4, -1, base.shape.vocab_size)
        plain = AutoModelForCausalLM.from_pretrained(str(base_directory), device_map="cpu")
        model = PeftModel.from_pretrained(plain, str(apart[0]), "0").eval()
        for i in (1, 2):
            model.load_adapter(str(apart[i]), str(i))
        with model.disable_adapter():
            before = model(batch.inputs[:1]).logits[0]
        for row, names in enumerate((["0"], ["1"], ["2"], ["0", "1", "2"])):
            model.base_model.set_adapter(names)
            theirs = model(batch.inputs[:1]).logits[0]
            assert (theirs - before).norm() > 0.2 * before.norm()
            assert (ours[row] - theirs).norm() < 3e-2 * theirs.norm()


def test_layer_scales_are_served_as_they_were_trained(base, apart):
    """The server's reader gives each module the scaled alpha that PEFT reads from the pattern."""
    settings = parse_config((apart[2] / "adapter_config.json").read_bytes())
    alphas = settings.alphas()
    found = {alphas.get(projection_path(i, "k_proj"), 6.0) for i in range(base.shape.layers)}
    assert len(found) == base.shape.layers


def test_a_stack_goes_on_where_its_directories_end(base, apart, tmp_path):
    """Saved again and loaded again it computes the same; what was no module of it stays none."""
    stacked = load_peft(base.shape, apart)
    batch = collate([TokenRow(tuple(b"reverse 'kavo'"), (258,))])
    save_peft(stacked, 1, tmp_path / "again")
    again = load_peft(base.shape, [tmp_path / "again"])
    before = batch_hidden(base.decoder, batch, stacked, torch.tensor([[0, 1.0, 0]]))
    after = batch_hidden(base.decoder, batch, again, torch.ones(1, 1))
    torch.testing.assert_close(before, after, rtol=1e-2, atol=1e-2)
    stacked.requires_grad_()
    row = MixedRow(TokenRow(tuple(b"reverse 'kavo'"), (258,)), ((1, 1.0),))
    row_losses(base.decoder, stacked, [row]).sum().backward()
    assert not any(t.any() for t in stacked.projection(0, "k_proj", 1))
    gradient = stacked.a["0/qkv/1"].grad
    assert gradient is not None
    assert gradient.unflatten(0, (3, -1)).abs().amax((1, 2)).gt(0).tolist() == [True, False, True]


@pytest.mark.parametrize("fault", ["missing", "half", "foreign", "dora", "rank"])
def test_directories_that_cannot_be_trained_are_refused_by_name(base, apart, fault):
    """The error names the directory, what is wrong and what to give; no path."""
    directory = apart[0]
    file, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors, text = load_file(str(file)), config.read_text()
    first = next(name for name in sorted(tensors) if "lora_A" in name)
    if fault == "missing":
        file.unlink()
    elif fault == "half":
        save_file({k: v for k, v in tensors.items() if k != first}, str(file))
    elif fault == "foreign":
        save_file(
            {**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, str(file)
        )
    elif fault == "dora":
        config.write_text(text.replace('"use_dora": false', '"use_dora": true'))
    else:
        config.write_text(text.replace('"r": 2', '"r": 3'))
    with pytest.raises(InvalidArgument, match=r"adapters: '0': .*give directories") as error:
        load_peft(base.shape, apart)
    assert str(directory) not in str(error.value)


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


def rows_of_sizes(sizes):
    """So many rows of each adapter, side by side."""
    owners = [i for i, n in enumerate(sizes) for _ in range(n)]
    return [MixedRow(TokenRow((1,), (2,)), ((i, 1.0),)) for i in owners]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_parts_hold_every_row_once(sizes):
    """In order, and even within reason."""
    rows = rows_of_sizes(sizes)
    found = parts(rows, size=32)
    assert [row for part in found for row in part] == rows
    assert all(0 < len(part) <= 64 for part in found)


@given(st.lists(st.integers(1, 8), min_size=12, max_size=40))
def test_parts_keep_small_mixtures_whole(sizes):
    """With eight rows or fewer a mixture, a change is near every cut."""
    found = parts(rows_of_sizes(sizes), size=32)
    assert all(a[-1].mixture != b[0].mixture for a, b in itertools.pairwise(found))
