"""Prototypes: a few directions that stand for many prompts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.router.arrays import unit
from mora_serve.router.prototypes import prototypes
from tests.router.make import vectors


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_there_are_as_many_unit_vectors_as_asked_for(rows: int, count: int, seed: int) -> None:
    found = prototypes(vectors(seed, rows, 16), count)
    assert found.shape == (count, 16)
    assert np.allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)


def test_few_prompts_are_their_own_prototypes_and_the_last_is_repeated() -> None:
    embedded = vectors(0, 2)
    assert (prototypes(embedded, 4) == embedded[[0, 1, 1, 1]]).all()


def test_one_prototype_is_the_mean_direction() -> None:
    embedded = vectors(0, 9)
    assert np.allclose(prototypes(embedded, 1), unit(embedded.sum(0, keepdims=True)))


def test_each_kind_of_prompt_gets_a_prototype_of_its_own() -> None:
    kinds = vectors(0, 3)
    embedded = unit(kinds[np.arange(30) % 3] + 0.02 * vectors(1, 30))
    found = prototypes(embedded, 3)
    assert ((kinds @ found.T).max(1) > 0.95).all()
    assert sorted((kinds @ found.T).argmax(1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_same_rows_give_the_same_bits(count: int) -> None:
    embedded = vectors(3, 20)
    assert (prototypes(embedded, count) == prototypes(embedded.copy(), count)).all()


def test_zeros_stay_zeros() -> None:
    assert (unit(np.zeros((2, 3), np.float32)) == 0).all()
