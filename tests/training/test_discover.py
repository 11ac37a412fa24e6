"""Tasks found without labels, on a small base: three tasks, each asked for in four ways."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from mora_serve.adapters import card
from mora_serve.config import AdaptersConfig
from mora_serve.errors import InvalidArgument
from mora_serve.model.stacked import StackedAdapters
from router_training.batched import AdapterRecipe, copy_adapter
from router_training.batches import TokenRow
from router_training.discover import DiscoverRecipe, discover
from router_training.discovered import UnlabelledRow, measure_losses
from router_training.peft_files import load_peft

ADAPTERS = AdapterRecipe(rank=2, alpha=4, steps=96, rows=8, warmup=4, lr=2e-2)
RECIPE = DiscoverRecipe(ADAPTERS, start_rounds=2)
CUES = (("turn", "flip", "mirror", "swap"), ("count", "size", "total", "sum"), ("shout", "caps"))


def rows_of(count, seed):
    """Prompts that share one word a task with others, and a task's two answer tokens."""
    rng = random.Random(seed)
    rows, own = [], []
    for i in range(count):
        task = i % len(CUES)
        letters = "".join(rng.choices("abcdefgh", k=4))
        text = f"{rng.choice(CUES[task])} {letters}"
        answer = (65 + task, 75 + task, 258)
        rows.append(UnlabelledRow(TokenRow(tuple(text.encode()), answer), text))
        own.append(task)
    return rows, own


@pytest.fixture(scope="module")
def rows():
    return rows_of(90, 0)


@pytest.fixture(scope="module")
def found(base, rows):
    return discover(base.decoder, rows[0], 3, RECIPE, lambda line: None)


def test_tasks_are_found(found, rows):
    """Clusters of prompts are finer or mixed; adapters and prompts together give the tasks."""
    assert adjusted_rand_score(rows[1], found.start) < 0.8
    assert adjusted_rand_score(rows[1], found.assignment) > 0.95


def test_prompts_alone_are_routed_to_their_task(found):
    """Fresh prompts, before any answer is known."""
    fresh, own = rows_of(60, 1)
    chances = found.route([row.text for row in fresh])
    assert np.allclose(chances.sum(1), 1)
    assert adjusted_rand_score(own, chances.argmax(1)) > 0.95


def test_each_adapter_answers_its_own_task(base, found):
    """By far better than the base, and than the adapters of other tasks."""
    fresh, _ = rows_of(30, 2)
    losses = measure_losses(
        base.decoder, found.adapters, [row.tokens for row in fresh], [0, 1, 2, None]
    )
    own = found.route([row.text for row in fresh]).argmax(1)
    right = losses[np.arange(len(fresh)), own].mean()
    assert right < losses[:, 3].mean() - 1
    assert right < losses[np.arange(len(fresh)), (own + 1) % 3].mean() - 1


def test_a_pool_may_be_larger_than_the_number_of_tasks(base, rows):
    """Adapters that would be the same are joined, so that no task is cut to pieces.

    None are spare here: 90 rows are too few for more than five.
    """
    larger = discover(base.decoder, rows[0], 5, replace(RECIPE, spare=1.0), lambda line: None)
    assert 3 <= larger.adapters.count <= 5
    assert adjusted_rand_score(rows[1], larger.assignment) > 0.8


def test_the_search_follows_its_seed(base, rows):
    """The same rows and recipe give the same adapters and the same assignment."""
    short = DiscoverRecipe(AdapterRecipe(rank=2, steps=49, rows=4), start_rounds=1)
    a, b = (discover(base.decoder, rows[0], 3, short, lambda line: None) for _ in range(2))
    assert (a.assignment == b.assignment).all()
    pairs = zip(a.adapters.parameters(), b.adapters.parameters(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_what_is_found_can_be_served(base, found, rows, tmp_path):
    """Each adapter is a PEFT directory whose card has prompts of its own task and no other's."""
    found.save(rows[0], tmp_path, base.fingerprint)
    directories = sorted(tmp_path.iterdir())
    assert [d.name for d in directories] == list(found.names)
    loaded = load_peft(base.shape, directories)
    some = [row.tokens for row in rows[0][:8]]
    columns = range(loaded.count)
    before = measure_losses(base.decoder, found.adapters, some, columns)
    assert np.allclose(before, measure_losses(base.decoder, loaded, some, columns), atol=0.02)
    task_of = {row.text: task for row, task in zip(*rows, strict=True)}
    for directory in directories:
        routing = card.parse_card((directory / card.FILE).read_bytes(), AdaptersConfig())
        assert routing.tasks == (directory.name,)
        assert routing.base_fingerprint == base.fingerprint
        assert len(routing.prompts) == 16
        assert len({task_of[prompt] for prompt in routing.prompts}) == 1
        assert json.loads((directory / "adapter_config.json").read_text())["r"] == 2


def test_losses_do_not_depend_on_what_else_is_measured(base, found, rows):
    """Nor on the order of rows and columns."""
    some = [row.tokens for row in rows[0][:12]]
    together = measure_losses(base.decoder, found.adapters, some, [2, None, 0])
    assert np.allclose(
        together[5:6, ::-1],
        measure_losses(base.decoder, found.adapters, some[5:6], [0, None, 2]),
        atol=1e-4,
    )


def test_a_copied_adapter_is_the_other_bit_for_bit(base):
    """And the rest of the stack stays."""
    stack = StackedAdapters(base.shape, 3, 2, 4)
    before = {name: value.clone() for name, value in stack.export(1).items()}
    copy_adapter(stack, 0, 2)
    for name, value in stack.export(0).items():
        assert torch.equal(value, stack.export(2)[name])
        assert torch.equal(before[name], stack.export(1)[name])


@pytest.mark.parametrize(
    ("count", "pool", "steps", "field"),
    [(90, 1, 96, "pool_size"), (29, 3, 96, "rows"), (90, 3, 48, "adapters.steps")],
)
def test_what_cannot_work_is_refused(base, rows, count, pool, steps, field):
    """The error names the field, the value and the least that works."""
    recipe = DiscoverRecipe(AdapterRecipe(steps=steps), start_rounds=2)
    with pytest.raises(InvalidArgument, match=f"^{field}: .* give ") as caught:
        discover(base.decoder, rows[0][:count], pool, recipe, lambda line: None)
    assert caught.value.field == field
