"""A stream that another replica goes on with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.cluster.resume import Diverged, Sent
from mora_serve.core import Event, Finish, TokenOut


def event(tokens: str, finish: Finish | None = None) -> Event:
    """A letter is a token, and its text."""
    return Event("r", tuple(TokenOut(ord(c)) for c in tokens), tokens, finish)


def pieces(text: str, cuts: list[int]) -> list[str]:
    ends = sorted({min(c, len(text)) for c in cuts} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


cuts = st.lists(st.integers(0, 40), max_size=6)


@given(st.text("abcd", min_size=1, max_size=40), st.integers(0, 40), cuts, cuts)
def test_the_caller_gets_each_token_once_however_the_answer_comes(
    answer: str, lost_at: int, first: list[int], second: list[int]
):
    sent = Sent()
    got = [sent.rest(event(piece)) for piece in pieces(answer[:lost_at], first)]
    sent.restart()
    got += [sent.rest(event(piece)) for piece in pieces(answer, second)]
    got.append(sent.rest(event("", Finish.STOP)))
    events = [e for e in got if e is not None]
    assert "".join(e.text for e in events) == answer
    assert [t.id for e in events for t in e.tokens] == [ord(c) for c in answer]
    assert events[-1].finish is Finish.STOP


def test_another_answer_is_not_patched_on():
    sent = Sent()
    sent.rest(event("abc"))
    sent.restart()
    with pytest.raises(Diverged):
        sent.rest(event("abd"))


def test_a_shorter_answer_is_another_one():
    sent = Sent()
    sent.rest(event("abc"))
    sent.restart()
    with pytest.raises(Diverged):
        sent.rest(event("ab", Finish.STOP))
