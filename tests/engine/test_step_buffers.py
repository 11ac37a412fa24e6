"""Decode steps laid out from what the step before left, against steps laid out anew."""

from __future__ import annotations

import contextlib
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mora_serve.core import AdapterWeight, Mixture, Request, SamplingParams
from mora_serve.engine.scheduler import Chunk
from mora_serve.engine.sequence import Sequence
from mora_serve.engine.step_buffers import DecodeRows, StepBuffers, fill_prompts

CPU = torch.device("cpu")
SIZE, PAGES, ROWS = 4, 32, 8
SLOTS = {"aa": 3, "bb": 5}


def running(number: int, tokens: int, mixture: tuple[str, ...] = (), **sampling: float) -> Sequence:
    """A sequence whose answer began with its last token, with pages for all."""
    weights = tuple(AdapterWeight(d, 0.5 + i, d) for i, d in enumerate(mixture))
    params = SamplingParams(100, seed=number - 3, **sampling)  # type: ignore[arg-type]
    prompt = tuple(range(number, number + tokens))
    sequence = Sequence(Request(f"r{number}", prompt, params, Mixture(weights)), None)  # type: ignore[arg-type]
    sequence.pages = [100 * number + i for i in range(-(-tokens // SIZE))]
    return sequence


def decoding(sequence: Sequence) -> Chunk:
    return Chunk(sequence, len(sequence.tokens) - 1, 1, True)


def answered(sequence: Sequence) -> None:
    """A token more, and a page for it where the last one is full."""
    sequence.append(9)
    if len(sequence.tokens) > SIZE * len(sequence.pages):
        sequence.pages.append(1000 + len(sequence.tokens))


def check(rows: DecodeRows, batch: list[Chunk], bucket: int, places: np.ndarray) -> None:
    """Each chunk's row says what the chunk is; all other rows are padding."""
    d = {name: t.numpy() for name, t in rows.buffers.device.items()}
    assert len(set(places.tolist())) == len(batch)
    for chunk, row in zip(batch, places, strict=True):
        s, at = chunk.sequence, chunk.start
        assert row < bucket
        assert d["tokens"][row] == s.tokens[at]
        assert d["positions"][row] == at
        assert d["lengths"][row] == at + 1
        assert d["places"][row] == s.pages[at // SIZE] * SIZE + at % SIZE
        used = at // SIZE + 1
        assert d["table"][row, :used].tolist() == s.pages[:used]
        assert d["draws"][row] == at + 1 - s.prompt_length
        assert d["temperatures"][row] == np.float32(s.request.sampling.temperature)
        assert d["seeds"][row] == s.request.sampling.seed
        assert rows.mixtures[row] == tuple((SLOTS[x], w) for x, w in s.weights)
    for row in set(range(bucket)) - set(places.tolist()):
        assert d["places"][row] == -1
        assert d["lengths"][row] == d["tokens"][row] == d["temperatures"][row] == 0
        assert rows.mixtures[row] == ()


@settings(max_examples=300)
@given(chance=st.randoms(use_true_random=True))  # its draws are many: one by one they take long
def test_a_step_finds_what_it_would_if_it_were_laid_out_anew(chance: random.Random) -> None:
    """Sequences come, go, skip steps, and come back with other pages after a preemption.

    Steps raise while they are laid out or later, and are run again in parts, or token by token.
    """
    rows = DecodeRows(StepBuffers(ROWS, ROWS, PAGES, CPU), SIZE)
    alive: list[Sequence] = []
    numbers = itertools.count(1)

    def once_in(turns: int) -> bool:
        return not chance.randrange(turns)

    for _ in range(chance.randint(1, 12)):
        for _ in range(chance.randint(0, ROWS - len(alive))):
            mixture = chance.choice([(), ("aa",), ("aa", "bb")])
            hot = chance.choice([0.0, 0.8])
            alive.append(running(next(numbers), chance.randint(1, 30), mixture, temperature=hot))
        for sequence in list(alive):
            if once_in(5):
                alive.remove(sequence)
            elif once_in(6):  # preempted, and back with other pages
                sequence.pages = [7 * page + 1 for page in sequence.pages]
        here = [s for s in alive if not once_in(6)]
        if not here:
            continue
        if once_in(2):
            chance.shuffle(here)
        batch = [decoding(s) for s in here]
        if once_in(8):  # one of the tokens of before, as isolation cuts them
            at = chance.randint(0, batch[0].start)
            batch[0] = Chunk(batch[0].sequence, at, 1, at == batch[0].start)
        bucket = chance.randint(len(batch), ROWS)
        if once_in(8):
            with contextlib.suppress(KeyError):
                rows.fill(batch, bucket, {}.__getitem__)
        before = list(rows.mixtures)
        places, changed = rows.fill(batch, bucket, SLOTS.__getitem__)
        check(rows, batch, bucket, places)
        assert changed or rows.mixtures == before
        if not once_in(4):
            device = {name: t.clone() for name, t in rows.buffers.device.items()}
            rows.ahead()
            assert all(torch.equal(t, rows.buffers.device[name]) for name, t in device.items())
        if not once_in(8):
            for chunk in batch:
                if chunk.samples:
                    answered(chunk.sequence)


def test_the_next_step_of_the_same_sequences_lacks_only_tokens_and_new_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All else was laid out while the one before ran."""
    rows = DecodeRows(StepBuffers(ROWS, ROWS, PAGES, CPU), SIZE)
    some = [running(i, 4 + i, ("aa",), temperature=0.8) for i in range(1, 6)]
    rows.fill([decoding(s) for s in some], ROWS, SLOTS.__getitem__)
    for _ in range(2 * SIZE):
        rows.ahead()
        for s in some:
            answered(s)
        batch = [decoding(s) for s in some]
        with monkeypatch.context() as patched:
            patched.setattr(rows, "_place", None)
            patched.setattr(rows, "_lay_out", None)
            places, changed = rows.fill(batch, ROWS, SLOTS.__getitem__)
        assert not changed
        check(rows, batch, ROWS, places)


def test_after_the_last_token_of_a_context_no_place_is_laid_out() -> None:
    """There is no page for it, nor room in the table."""
    rows = DecodeRows(StepBuffers(ROWS, ROWS, PAGES, CPU), SIZE)
    full, other = running(1, SIZE * PAGES), running(2, 5)
    rows.fill([decoding(full), decoding(other)], 2, SLOTS.__getitem__)
    rows.ahead()
    answered(other)
    places, _ = rows.fill([decoding(other)], 1, SLOTS.__getitem__)
    check(rows, [decoding(other)], 1, places)


def test_nothing_is_laid_out_ahead_of_nothing() -> None:
    """Before the first step, and after a reset."""
    rows = DecodeRows(StepBuffers(ROWS, ROWS, PAGES, CPU), SIZE)
    rows.ahead()
    rows.fill([decoding(running(1, 5))], 1, SLOTS.__getitem__)
    rows.reset()
    rows.ahead()
    rows.buffers.upload(ROWS)
    assert rows.buffers.device["places"].tolist() == [-1] * ROWS
    assert not rows.buffers.device["positions"].any()


def test_a_sequence_keeps_its_row_and_nothing_changes_while_the_same_ones_decode() -> None:
    rows = DecodeRows(StepBuffers(ROWS, ROWS, PAGES, CPU), SIZE)
    some = [running(i, 5, ("aa",)) for i in range(1, 5)]
    first, changed = rows.fill([decoding(s) for s in some], 4, SLOTS.__getitem__)
    assert changed
    for s in some:
        s.append(1)
    again, changed = rows.fill([decoding(s) for s in some], 4, SLOTS.__getitem__)
    assert not changed
    assert again.tolist() == first.tolist()
    left, changed = rows.fill([decoding(s) for s in some[2:]], 4, SLOTS.__getitem__)
    assert changed
    assert left.tolist() == first.tolist()[2:]
    moved, _ = rows.fill([decoding(s) for s in some[2:]], 2, SLOTS.__getitem__)
    assert sorted(moved.tolist()) == [0, 1]


def test_a_step_that_raised_as_it_was_laid_out_leaves_no_row_half_made() -> None:
    """Isolation runs its sequences again."""
    rows = DecodeRows(StepBuffers(ROWS, ROWS, PAGES, CPU), SIZE)
    batch = [decoding(running(i, 5, ("aa", "bb"), temperature=0.8)) for i in (1, 2)]
    with pytest.raises(KeyError):
        rows.fill(batch, 2, {"aa": SLOTS["aa"]}.__getitem__)
    places, changed = rows.fill(batch, 2, SLOTS.__getitem__)
    assert changed
    check(rows, batch, 2, places)
    with pytest.raises(KeyError):  # another one, which takes the rows of these
        rows.fill([decoding(running(3, 5, ("cc",)))], 2, SLOTS.__getitem__)
    places, changed = rows.fill(batch, 2, SLOTS.__getitem__)
    assert changed
    check(rows, batch, 2, places)


def test_after_a_reset_every_row_is_padding() -> None:
    rows = DecodeRows(StepBuffers(ROWS, ROWS, PAGES, CPU), SIZE)
    rows.fill([decoding(running(1, 5, ("aa",), temperature=1.0))], 1, SLOTS.__getitem__)
    rows.reset()
    other = running(2, 3)
    places, changed = rows.fill([decoding(other)], ROWS, SLOTS.__getitem__)
    assert changed
    check(rows, [decoding(other)], ROWS, places)


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"repetition_penalty": 1.1}, {"logprobs": 1}])
def test_a_row_that_needs_more_than_noise_is_not_drawn_here(sampling: dict[str, float]) -> None:
    rows = DecodeRows(StepBuffers(ROWS, ROWS, PAGES, CPU), SIZE)
    batch = [
        decoding(running(1, 5, temperature=0.7)),
        decoding(running(2, 5, temperature=0.7, **sampling)),
    ]
    places, _ = rows.fill(batch, 2, SLOTS.__getitem__)
    assert rows.buffers.drawn(places) == [0]


def test_prompts_are_laid_out_one_after_another_and_what_samples_is_told() -> None:
    buffers = StepBuffers(64, ROWS, PAGES, CPU)
    one, two, three = running(1, 9), running(2, 14, temperature=0.5), running(3, 6)
    one.append(8)
    batch = [Chunk(one, 9, 1, True), Chunk(two, 6, 8, True), Chunk(three, 0, 4, False)]
    one.pages.append(150)
    assert fill_prompts(buffers, batch, SIZE) == 2
    d = {name: t.numpy() for name, t in buffers.device.items()}
    assert d["tokens"][:13].tolist() == [8, *two.tokens[6:14], *three.tokens[:4]]
    assert d["positions"][:13].tolist() == [9, *range(6, 14), *range(4)]
    places = [s.pages[p // SIZE] * SIZE + p % SIZE for s, p in _tokens(batch)]
    assert d["places"][:13].tolist() == places
    assert d["starts"][:3].tolist() == [0, 1, 9]
    assert d["counts"][:3].tolist() == [1, 8, 4]
    assert d["contexts"][:3].tolist() == [9, 6, 0]
    assert d["lengths"][:3].tolist() == [10, 14, 4]
    assert d["last"][:2].tolist() == [0, 8]
    assert d["draws"][:2].tolist() == [1, 0]
    assert d["temperatures"][:2].tolist() == [0.0, 0.5]
    assert d["table"][1, :4].tolist() == two.pages


def _tokens(batch: list[Chunk]) -> list[tuple[Sequence, int]]:
    return [(c.sequence, p) for c in batch for p in range(c.start, c.start + c.length)]
