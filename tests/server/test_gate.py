"""Places at work: bounded, shared by tenants, given back."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mora_serve.errors import ResourceExhausted
from mora_serve.server import prompts as prompts_module
from mora_serve.server.gate import Places
from mora_serve.server.prompts import Prompts
from mora_serve.v1 import generation_pb2 as pb


def test_a_tenant_takes_half_and_another_still_finds_places() -> None:
    places = Places(8, "uploads")
    with contextlib.ExitStack() as held:
        for _ in range(4):
            held.enter_context(places.taken("a"))
        with pytest.raises(ResourceExhausted, match="this tenant has as many uploads") as e:
            places.taken("a").__enter__()
        assert e.value.reason == "BUSY"
        assert e.value.retry_after
        for _ in range(2):
            held.enter_context(places.taken("b"))
        held.enter_context(places.taken("c"))
        held.enter_context(places.taken("d"))
        with pytest.raises(ResourceExhausted, match="it has as many uploads"):
            places.taken("e").__enter__()
    with places.taken("a"), places.taken("a"):
        pass


class Slow:
    """A tokenizer that waits until it may go on."""

    has_chat_template = False

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def encode(self, text: str) -> list[int]:
        self.go_on.wait(60)
        return [1] * len(text)

    def decode(self, ids: object) -> str:
        return ""

    def chat(self, messages: object) -> list[int]:
        return []

    def vocabulary(self) -> dict[str, int]:
        return {"a": 1}


async def test_long_prompts_wait_in_a_line_that_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tenant's long prompts are refused beyond its half; another's is tokenised."""
    monkeypatch.setattr(prompts_module, "MAX_WAITING", 8)
    tokenizer = Slow()
    with ThreadPoolExecutor(1) as executor:
        prompts = Prompts(tokenizer, 300, 100_000, executor)
        prompt = pb.Prompt(text="a" * 5000)
        waiting = [asyncio.create_task(prompts.tokens(prompt, "a")) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted) as e:
            await prompts.tokens(prompt, "a")
        assert e.value.reason == "BUSY"
        other = asyncio.create_task(prompts.tokens(prompt, "b"))
        tokenizer.go_on.set()
        assert [len(ids) for ids in await asyncio.gather(*waiting, other)] == [5000] * 5
        assert len(await prompts.tokens(prompt, "a")) == 5000
