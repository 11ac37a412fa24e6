"""The sampler against transformers' processors, its distribution, and independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.core import SamplingParams
from mora_serve.engine.sampler import SamplingRow, is_finite, sample


def row(prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), prompt, output)


def ids(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    return [token.id for token in sample(logits, rows)]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def reference(logits: torch.Tensor, r: SamplingRow) -> torch.Tensor:
    """Scores of one row after transformers' own processors."""
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    p = r.params
    seen = torch.tensor([[*r.prompt, *r.output]])
    scores = logits[None]
    if p.repetition_penalty != 1.0 and seen.numel():
        scores = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(seen, scores)
    scores = scores.clone()
    for token in set(r.output):
        scores[0, token] -= p.frequency_penalty * r.output.count(token) + p.presence_penalty
    scores = TemperatureLogitsWarper(p.temperature)(seen, scores)
    if p.top_k:
        scores = TopKLogitsWarper(p.top_k)(seen, scores)
    if p.top_p < 1:
        scores = TopPLogitsWarper(p.top_p)(seen, scores)
    if p.min_p > 0:
        scores = MinPLogitsWarper(p.min_p)(seen, scores)
    return scores[0]


tokens = st.lists(st.integers(0, 39), max_size=12).map(tuple)
any_row = st.builds(
    row,
    tokens,
    tokens,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 3, 17, 40, 99]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.4]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 0.8]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), any_row)
def test_penalties_and_filters_are_those_of_transformers(seed: int, r: SamplingRow) -> None:
    """Sampling with everything on equals plain sampling from what transformers lets through."""
    logits = noise(seed, 40)
    plain = row((), r.output, temperature=1.0, seed=r.params.seed)
    assert ids(logits[None], [r]) == ids(reference(logits, r)[None], [plain])


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_large_vocabularies_are_filtered_alike(spread: float) -> None:
    """Few likely tokens or thousands: the nucleus is the same, and so in any batch."""
    params = [{"top_p": 0.9}, {"top_k": 2500}, {"top_k": 2500, "top_p": 0.95}, {"top_p": 0.3}]
    rows = [row(temperature=1.0, seed=i, **params[i % 4]) for i in range(24)]
    logits = noise(9, len(rows), 5000) * spread
    plain = [row(temperature=1.0, seed=i) for i in range(24)]
    expected = torch.stack([reference(line, r) for line, r in zip(logits, rows, strict=True)])
    assert ids(logits, rows) == ids(expected, plain)
    assert ids(logits, rows) == [
        ids(line[None], [r])[0] for line, r in zip(logits, rows, strict=True)
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(any_row, min_size=1, max_size=9))
def test_a_row_does_not_depend_on_the_batch(seed: int, rows: list[SamplingRow]) -> None:
    """Token and log-probabilities are equal bit for bit alone and among others."""
    rows = [*rows, row(logprobs=3, temperature=1.0, top_k=9, top_p=0.8), row(logprobs=5)]
    logits = noise(seed, len(rows), 40)
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
    assert torch.equal(logits, noise(seed, len(rows), 40))


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 1.0]])
    assert ids(logits, [row(), row(temperature=1e-7)]) == [1, 0]


def test_penalties_reach_greedy_rows() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.9]])
    assert ids(logits, [row(output=(1,), presence_penalty=0.5)]) == [2]
    assert ids(logits, [row(prompt=(1,), presence_penalty=0.5)]) == [1]
    assert ids(logits, [row(prompt=(1,), repetition_penalty=1.5)]) == [2]
    assert ids(logits, [row(output=(1, 1, 1), frequency_penalty=0.04)]) == [2]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies_follow_the_probabilities(vary: str) -> None:
    """Over seeds, and over positions of one seed; pairs of neighbours are independent too."""
    n, logits = 4000, torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, 1.5])
    zeros = [0] * n
    rows = [
        row(temperature=1.0, seed=i)
        if vary == "seed"
        else SamplingRow(SamplingParams(temperature=1.0, seed=7), (), zeros[:i])
        for i in range(n)
    ]
    drawn = torch.tensor(ids(logits.expand(n, -1), rows))
    p = logits.softmax(-1)
    assert chi_square(drawn.bincount(minlength=8), n * p) < 29.9  # 7 degrees, 1e-4
    pairs = (drawn[:-1] * 8 + drawn[1:]).bincount(minlength=64)
    assert chi_square(pairs, (n - 1) * torch.outer(p, p).flatten()) < 118  # 63 degrees, 1e-5


def test_filters_do_not_shift_the_noise() -> None:
    """A token that would win without a filter wins with one that lets it through."""
    logits = noise(1, 50)
    for seed in range(50):
        free = ids(logits[None], [row(temperature=1.0, seed=seed)])[0]
        rank = int((logits > logits[free]).sum()) + 1
        assert ids(logits[None], [row(temperature=1.0, seed=seed, top_k=rank)]) == [free]


def split_mix(x: int) -> int:
    mask = 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


@pytest.mark.parametrize("seed", [0, 5, 2**63 + 5, 2**64 - 1])
def test_the_noise_of_a_seed_never_changes(seed: int) -> None:
    """On uniform logits the largest uniform wins: SplitMix64 written out in whole numbers."""
    mask, gamma = 2**64 - 1, 0x9E3779B97F4A7C15
    for position in range(6):
        state = split_mix(split_mix(seed) + gamma * (position + 1) & mask)
        uniforms = [split_mix(state + gamma * (token + 1) & mask) >> 12 for token in range(1000)]
        r = row((), (0,) * position, temperature=1.0, seed=seed)
        assert ids(torch.zeros(1, 1000), [r]) == [uniforms.index(max(uniforms))]


def test_ties_with_the_last_one_let_through_are_let_through() -> None:
    """As in transformers: which of equal tokens survives must not depend on a sort."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, -2.0]])
    rows = [row(temperature=1.0, top_k=2, seed=i) for i in range(200)]
    assert set(ids(logits.expand(200, -1), rows)) == {0, 1, 2, 3}
    logits = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, -3.0]])  # the best is 0.73 of two, 0.4 of five
    rows = [row(temperature=1.0, top_k=2, top_p=0.6, seed=i) for i in range(200)]
    assert set(ids(logits.expand(200, -1), rows)) == {0, 1, 2, 3, 4}


def test_logprobs_are_of_the_raw_logits_best_first() -> None:
    logits = noise(3, 2, 30)
    first, second = sample(
        logits,
        [row(logprobs=4, temperature=0.5, top_k=1, prompt=(0,), repetition_penalty=9.0), row()],
    )
    expected = logits[0].log_softmax(-1)
    assert first.logprob == pytest.approx(float(expected[first.id]))
    assert [t.token for t in first.top] == expected.argsort(descending=True)[:4].tolist()
    assert [t.logprob for t in first.top] == pytest.approx(expected.sort().values[-4:].flip(0))
    assert (second.logprob, second.top) == (None, ())
    assert sample(logits[:1], [row(logprobs=0)])[0].top == ()


def test_rows_that_are_not_finite_are_found_and_harm_no_other() -> None:
    logits = noise(4, 4, 20)
    rows = [row(temperature=1.0, top_p=0.9, top_k=5, seed=i, logprobs=2) for i in range(4)]
    clean = sample(logits, rows)
    logits[1, 3], logits[2, 7] = math.nan, math.inf
    assert is_finite(logits).tolist() == [True, False, False, True]
    spoilt = sample(logits, rows)
    assert [spoilt[0], spoilt[3]] == [clean[0], clean[3]]


def test_nothing_to_sample_is_nothing() -> None:
    assert sample(torch.zeros(0, 8), []) == []
