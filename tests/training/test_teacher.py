"""The teacher labels rows by what adapters add to their answers' likelihood."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mora_serve.model.stacked import StackedAdapters
from router_training import teacher
from router_training.batched import MixedRow, row_losses
from router_training.generation import greedy
from router_training.rows import TextRow, token_row
from router_training.teacher import likelihood_gains, responsibilities, teach, temperature_of

GAINS = arrays(
    np.float64,
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(-80, 80, allow_subnormal=False),
)


@pytest.fixture(scope="module")
def adapters(base):
    """Three random adapters, each of which changes what the base answers."""
    torch.manual_seed(1)
    adapters = StackedAdapters(base.shape, 3, rank=4, alpha=8.0)
    with torch.no_grad():
        for matrix in adapters.b.values():
            matrix.normal_(std=0.5)
    return adapters.requires_grad_(False)


@pytest.fixture(scope="module")
def rows(base, adapters):
    """Rows that an adapter each has answered, and that adapter's number."""
    prompts = [f"tell me of {w}" for w in ("stone", "a river", "the moon", "two lamps")]
    made = []
    for i in range(3):
        weights = torch.zeros(len(prompts), 3)
        weights[:, i] = 1.0
        asked = [base.tokenizer.row(p, "x")[0] for p in prompts]
        ids = greedy(base.decoder, asked, frozenset(), 8, adapters, weights)
        made += [(i, teacher.TokenRow(tuple(a), tuple(b))) for a, b in zip(asked, ids, strict=True)]
    return made


def test_what_an_adapter_answered_is_labelled_with_it(base, adapters, rows):
    gains = likelihood_gains(base.decoder, adapters, [row for _, row in rows])
    labels = teach(gains, ("x", "y", "z"), temperature_of(gains))
    assert labels == [("xyz"[i],) for i, _ in rows]


def test_gains_are_differences_of_log_likelihoods(base, adapters, rows, monkeypatch):
    """Of whole answers, whatever shares a pass with them."""
    some = [rows[0][1], rows[5][1], token_row(base.tokenizer, TextRow("b", "longer than that"), 99)]
    gains = likelihood_gains(base.decoder, adapters, some)
    monkeypatch.setattr(teacher, "LOGGED", 1)
    np.testing.assert_allclose(
        gains, likelihood_gains(base.decoder, adapters, some), rtol=1e-4, atol=1e-3
    )
    dense = base.decoder.dense()
    for n, row in enumerate(some):
        alone = [
            row_losses(dense, adapters, [MixedRow(row, m)]).item() * len(row.answer)
            for m in ((), ((0, 1.0),), ((1, 1.0),), ((2, 1.0),))
        ]
        assert gains[n] == pytest.approx([alone[0] - a for a in alone[1:]], rel=1e-3, abs=1e-2)


def test_a_row_that_no_adapter_helps_has_no_label():
    gains = np.array([[-3.0, -8.0], [0.0, 0.0], [9.0, 1.0]])
    assert teach(gains, ("x", "y"), 1.0) == [(), (), ("x",)]
    assert teach(gains, ("x", "y"), 1.0, threshold=0.2) == [(), (), ("x",)]


@given(
    gains=GAINS,
    temperature=st.floats(0.01, 100, allow_subnormal=False),
    threshold=st.floats(0.01, 1.0),
)
def test_alternatives_are_no_mixture(gains, temperature, threshold):
    """Whatever the threshold, a row has one label at most, and that is the likeliest adapter."""
    names = tuple("abcde"[: gains.shape[1]])
    p = responsibilities(gains, temperature)[:, :-1]
    for row, own, label in zip(gains, p, teach(gains, names, temperature, threshold), strict=True):
        assert bool(label) == (row.max() > 0 and own.max() >= threshold)
        assert label in ((), (names[row.argmax()],))


@given(gains=GAINS, temperature=st.floats(0.01, 100, allow_subnormal=False))
def test_p_is_a_distribution_that_grows_with_the_gain(gains, temperature):
    p = responsibilities(gains, temperature)
    assert p.shape == (len(gains), gains.shape[1] + 1)
    np.testing.assert_allclose(p.sum(1), 1)
    full = np.column_stack((gains, np.zeros(len(gains))))
    assert (p.max(1) == np.take_along_axis(p, full.argmax(1)[:, None], 1)[:, 0]).all()


@given(
    gains=arrays(np.float64, (5, 3), elements=st.floats(1, 40, allow_subnormal=False), unique=True)
)
def test_the_chosen_temperature_has_the_perplexity_asked_for(gains):
    """Where the gains are apart, as any are that are worth telling apart."""
    gains = np.round(gains, 1) + np.arange(15).reshape(5, 3)[:, ::-1] / 7
    for wanted in (1.05, 1.5):
        p = responsibilities(gains, temperature_of(gains, wanted))
        entropy = -np.sum(p * np.log(np.maximum(p, 1e-300)), 1)
        assert np.exp(entropy).mean() == pytest.approx(wanted, abs=0.02)
