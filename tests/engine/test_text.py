"""Incremental text equals the text of all tokens, cut at the first complete stop string."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.engine.text import TextStream

Decode = Callable[[Sequence[int]], str]
WORDS = ["▁", "▁Hello", "▁world", "ing", ",", "▁été", "<s>"]


def byte_pieces(pieces: list[bytes]) -> Decode:
    """A byte-level tokenizer: tokens are byte strings that may end inside a character."""
    return lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace")


def sentence_pieces(ids: Sequence[int]) -> str:
    """Spaces in front of words, the first one stripped; bytes as a fallback; specials are silent.

    A run of bytes that is not whole characters becomes one U+FFFD a byte, as in tokenizers.
    """
    text, run = "", b""
    for i in [*ids, None]:
        if i is not None and i >= len(WORDS):
            run += bytes([i - len(WORDS)])
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        run = b""
        if i is not None and WORDS[i] != "<s>":
            text += WORDS[i].replace("▁", " ")
    return text.removeprefix(" ")


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string that is complete first, the longest of these."""
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return (text[: min(found)[1]], True) if found else (text, False)


def check(decode: Decode, ids: list[int], stop: Sequence[str] = ()) -> None:
    stream = TextStream(decode, tuple(stop))
    final, stopped = cut(decode(ids), stop)
    out = ""
    for n, i in enumerate(ids, 1):
        out += stream.push(i)
        assert final.startswith(out)
        assert stream.stopped == cut(decode(ids[:n]).rstrip("\ufffd"), stop)[1]
    assert out + stream.flush() == final
    assert stream.stopped == stopped
    assert not stopped or stream.push(ids[0]) == ""


text = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=40)


@st.composite
def cut_bytes(draw: st.DrawFn, source: st.SearchStrategy[str] = text) -> list[bytes]:
    data = draw(source).encode()
    borders = sorted(draw(st.sets(st.integers(0, len(data)), max_size=len(data))) | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


@given(cut_bytes())
def test_any_cut_of_the_bytes_gives_the_text(pieces: list[bytes]) -> None:
    check(byte_pieces(pieces), list(range(len(pieces))))


@given(
    cut_bytes(st.text("abé", max_size=30)),
    st.lists(st.text("abé", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_are_found_wherever_tokens_end(pieces: list[bytes], stop: list[str]) -> None:
    check(byte_pieces(pieces), list(range(len(pieces))), stop)


@given(st.data())
def test_words_with_spaces_in_front_and_bytes_as_a_fallback(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.one_of(st.integers(0, len(WORDS) - 1), st.sampled_from("€😀é"))))
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [len(WORDS) + b for b in part.encode()]
    runs = [
        i
        for i in range(len(ids) - 7)
        if all(WORDS[j : j + 1] in (["▁"], ["<s>"]) for j in ids[i : i + 8])
    ]
    if not runs:  # eight tokens without text are beyond what is looked back over
        check(sentence_pieces, ids)


def test_every_token_ends_inside_a_character() -> None:
    """Nothing is lost or doubled however long no token border is a character border."""
    data = ("x" + "€" * 400).encode()
    pieces = [data[:2], *(data[i : i + 3] for i in range(2, len(data), 3))]
    whole, longest = byte_pieces(pieces), 0
    stream = TextStream(lambda ids: whole(ids) if note(len(ids)) else "")

    def note(length: int) -> bool:
        nonlocal longest
        longest = max(longest, length)
        return True

    assert "".join(map(stream.push, range(len(pieces)))) + stream.flush() == data.decode()
    assert longest <= 40


def test_of_stop_strings_that_end_together_the_longest_counts() -> None:
    check(byte_pieces([b"xa", b"bc"]), [0, 1], ["b", "ab", "xab"])
    check(byte_pieces([b"xa", b"bc"]), [0, 1], ["abc", "b"])


def test_bytes_that_are_no_character_are_held_back_only_so_long() -> None:
    decode = byte_pieces([b"\xff", b"ok"])
    stream = TextStream(decode)
    assert "".join(stream.push(0) for _ in range(20)).count("\ufffd") >= 9
    assert stream.push(1).endswith("ok")
    assert stream.flush() == ""


def test_the_rest_comes_at_the_end() -> None:
    """An unfinished character, then an unfinished stop string, are text when nothing follows."""
    stream = TextStream(byte_pieces([b"ab\xe2"]), ())
    assert (stream.push(0), stream.flush()) == ("ab", "\ufffd")
    stream = TextStream(byte_pieces([b"ab"]), ("abc",))
    assert (stream.push(0), stream.flush(), stream.stopped) == ("", "ab", False)


def test_a_token_costs_the_same_however_many_came_before() -> None:
    """The window that is decoded stays small."""
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join("ab "[i] if i < 3 else "\ufffd" if i == 3 else "" for i in ids)

    stream = TextStream(decode, ("bbb",))
    for n in range(3000):
        stream.push((0, 1, 2, 3, 4)[n % 5 if n < 1000 else n % 3 if n < 2000 else 3 + n // 100 % 2])
    assert longest <= 40


@pytest.mark.parametrize("stop", [("",), ()])
def test_an_empty_stop_string_stops_nothing(stop: tuple[str, ...]) -> None:
    check(byte_pieces([b"abc"]), [0, 0], [s for s in stop if s])
    stream = TextStream(byte_pieces([b"abc"]), stop)
    assert (stream.push(0), stream.stopped) == ("abc", False)
