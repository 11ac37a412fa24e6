"""Prompts: what cannot fit is refused before it is read, what is long is read elsewhere."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mora_serve.errors import InvalidArgument, ResourceExhausted
from mora_serve.server.gate import Places
from mora_serve.server.prompts import Prompts
from mora_serve.v1 import generation_pb2 as pb


class Tokenizer:
    """Letters are ids; tells which threads it ran on, and refuses conversations of tools."""

    def __init__(self, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template
        self.threads: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.threads.append(threading.current_thread().name)
        return list(map(ord, text))

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def chat(self, messages: list[tuple[str, str]]) -> list[int]:
        if any(role == "tool" for role, _ in messages):
            raise InvalidArgument("messages: the template refuses them: no tools", field="messages")
        return self.encode("".join(content for _, content in messages))

    def vocabulary(self) -> dict[str, int]:
        return {"ab": 1, "c": 2}


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as executor:
        yield executor


def chat(*turns: tuple[str, str]) -> pb.Prompt:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    return pb.Prompt(chat=pb.Chat(messages=messages))


async def test_short_prompts_are_tokenised_at_once_and_long_ones_elsewhere(executor):
    """Many empty turns are long too."""
    tokenizer = Tokenizer()
    prompts = Prompts(tokenizer, 300, 10_000, executor)
    here = threading.current_thread().name
    long = [pb.Prompt(text="a" * 3000), chat(*[("user", "")] * 3000, ("user", "a"))]
    for prompt in (pb.Prompt(text="a"), chat(("user", "a")), *long):
        prompts.check(prompt)
        assert (await prompts.tokens(prompt))[0] == ord("a")
    assert tokenizer.threads == [here, here, "tokenize_0", "tokenize_0"]


@pytest.mark.parametrize(
    ("prompt", "field", "remedy"),
    [
        (chat(*[("nobody", "")] * 101), "prompt.chat.messages", "101 turns cannot fit"),
        (chat(("user", "a" * 201)), "prompt.chat", "201 characters cannot fit"),
        (pb.Prompt(text="a" * 201), "prompt.text", "201 characters cannot fit"),
    ],
    ids=["turns", "a long turn", "a long text"],
)
def test_what_cannot_fit_is_refused(executor, prompt, field, remedy):
    """No token has more than two characters here, and the context has 100."""
    prompts = Prompts(Tokenizer(), 300, 100, executor)
    prompts.check(pb.Prompt(text="a" * 200))
    with pytest.raises(InvalidArgument, match=remedy) as caught:
        prompts.check(prompt)
    assert (caught.value.field, caught.value.reason) == (field, "PROMPT_TOO_LONG")


async def test_what_the_template_refuses_is_named_as_in_the_request(executor):
    prompts = Prompts(Tokenizer(), 300, 100, executor)
    with pytest.raises(InvalidArgument, match=r"^prompt\.chat: .* no tools") as caught:
        await prompts.tokens(chat(("tool", "4")))
    assert caught.value.field == "prompt.chat"


def test_a_chat_needs_a_template(executor):
    prompts = Prompts(Tokenizer(has_chat_template=False), 300, 100, executor)
    with pytest.raises(InvalidArgument, match="give text or token_ids") as caught:
        prompts.check(chat(("user", "hello")))
    assert caught.value.field == "prompt.chat"


def test_places_are_given_back():
    """However the call in one ended."""
    places = Places(1, "uploads")
    for _ in range(2):
        with contextlib.suppress(RuntimeError), places.taken():
            with pytest.raises(ResourceExhausted, match="uploads"):
                places.taken().__enter__()
            raise RuntimeError
