"""The learnt correction: what it gains, and that it stays away where it gains nothing."""

from __future__ import annotations

import numpy as np

from mora_serve.router.arrays import Floats, unit
from router_training.correction import CorrectionRecipe, learn_correction

SIZE = 24
RECIPE = CorrectionRecipe(rank=8, steps=150, lr=1e-2, key_prompts=4)


def prompts(noise: Floats, count: int, seed: int) -> list[Floats]:
    """Adapters' prompts: a direction each, under noise of the given deviations [SIZE]."""
    own = unit(np.random.default_rng(0).normal(size=(6, SIZE)).astype(np.float32))
    rng = np.random.default_rng(seed)
    return [unit((d + rng.normal(size=(count, SIZE)) * noise).astype(np.float32)) for d in own]


def nobody(count: int) -> Floats:
    return unit(np.random.default_rng(9).normal(size=(count, SIZE)).astype(np.float32))


def accuracy(matrix: Floats, keys: list[Floats], asked: list[Floats]) -> float:
    centres = unit(np.stack([unit(z @ matrix).mean(0) for z in keys]))
    found = [(unit(z @ matrix) @ centres.T).argmax(1) == i for i, z in enumerate(asked)]
    return float(np.mean(found))


def test_it_learns_to_look_past_what_says_nothing() -> None:
    noise = np.full(SIZE, 0.05, np.float32)
    noise[:4] = 3.0  # four dimensions that drown the others
    learn, kept, new = (prompts(noise, 40, seed) for seed in (1, 2, 3))
    matrix = learn_correction(learn, kept, nobody(40), RECIPE)
    plain = accuracy(np.eye(SIZE, dtype=np.float32), learn, new)
    assert accuracy(matrix, learn, new) > plain + 0.1


def test_it_is_nothing_where_kept_prompts_do_not_gain() -> None:
    noise = np.full(SIZE, 0.1, np.float32)
    learn = prompts(noise, 30, 1)
    kept = [z[::-1] for z in reversed(prompts(noise, 10, 2))]  # labels that no prompt bears out
    matrix = learn_correction(learn, kept, nobody(30), RECIPE)
    assert np.allclose(matrix, np.eye(SIZE), atol=0.05)


def test_equal_prompts_give_an_equal_matrix() -> None:
    noise = np.full(SIZE, 0.3, np.float32)
    data = prompts(noise, 12, 1), prompts(noise, 6, 2), nobody(12)
    assert (learn_correction(*data, RECIPE) == learn_correction(*data, RECIPE)).all()
