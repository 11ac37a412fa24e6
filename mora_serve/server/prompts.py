"""Prompts: three forms -> token ids for the engine and text for the router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Protocol

from mora_serve.errors import InvalidArgument
from mora_serve.server.convert import check_chat, check_ids, invalid
from mora_serve.server.gate import Places
from mora_serve.v1 import generation_pb2 as pb

MAX_WAITING = 128  # long prompts at work, those that wait for a thread included
_SHORT = 2000  # characters and turns that are tokenised on the event loop: well under a millisecond


class Tokenizer(Protocol):
    """What prompts need of the base's tokenizer."""

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can work."""

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text."""

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """(role, content) messages -> ids."""

    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id."""


class Prompts:
    """Reads the prompts of requests. Long ones are tokenised on ``executor``'s threads."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, max_context: int, executor: Executor
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._executor = executor
        self._places = Places(MAX_WAITING, "long prompts")
        self._max_context = max_context
        # No token stands for more characters than its own, so longer texts need not be tokenised.
        longest = max(map(len, tokenizer.vocabulary()), default=1)
        self._max_characters = max_context * longest

    def check(self, prompt: pb.Prompt) -> None:
        """Raise InvalidArgument for a prompt that is missing, empty, or surely too long.

        Also for a chat where the base has no chat template.
        """
        kind = prompt.WhichOneof("kind")
        if kind is None:
            raise invalid("prompt", "it is missing; give text, token_ids or chat", "EMPTY_PROMPT")
        if kind == "text":
            if not prompt.text:
                raise invalid("prompt.text", "it is empty; give some text", "EMPTY_PROMPT")
            self._check_length("prompt.text", len(prompt.text), self._max_characters, "characters")
        elif kind == "token_ids":
            ids = prompt.token_ids.ids
            if not ids:
                raise invalid("prompt.token_ids", "it is empty; give some ids", "EMPTY_PROMPT")
            self._check_length("prompt.token_ids", len(ids), self._max_context, "tokens")
            check_ids("prompt.token_ids.ids", ids, self._vocab_size)
        else:
            if not self._tokenizer.has_chat_template:
                raise invalid(
                    "prompt.chat",
                    "this base model has no chat template; give text or token_ids",
                    "NO_CHAT_TEMPLATE",
                )
            turns = len(prompt.chat.messages)
            self._check_length("prompt.chat.messages", turns, self._max_context, "turns")
            check_chat(prompt.chat)
            size = sum(len(m.content) for m in prompt.chat.messages)
            self._check_length("prompt.chat", size, self._max_characters, "characters")

    async def tokens(self, prompt: pb.Prompt, tenant: str = "") -> tuple[int, ...]:
        """The token ids of a tenant's checked prompt.

        Raises InvalidArgument where the base's chat template refuses, ResourceExhausted when too
        many long prompts wait to be tokenised.
        """
        kind = prompt.WhichOneof("kind")
        if kind == "token_ids":
            return tuple(prompt.token_ids.ids)
        if kind == "text":
            text = prompt.text
            ids = await self._run(tenant, len(text), lambda: self._tokenizer.encode(text))
        else:
            turns = prompt.chat.messages
            size = len(turns) + sum(len(m.content) for m in turns)
            ids = await self._run(tenant, size, lambda: self._chat(turns))
        if not ids:
            raise invalid("prompt", "it has no tokens; give some text", "EMPTY_PROMPT")
        return tuple(ids)

    def _chat(self, turns: Sequence[pb.ChatMessage]) -> list[int]:
        try:
            return self._tokenizer.chat([(m.role, m.content) for m in turns])
        except InvalidArgument as e:  # the tokenizer knows no requests
            raise invalid("prompt.chat", e.message.partition(": ")[2], e.reason) from None

    async def _run(self, tenant: str, size: int, tokenize: Callable[[], list[int]]) -> list[int]:
        if size <= _SHORT:
            return tokenize()
        with self._places.taken(tenant):
            return await asyncio.get_running_loop().run_in_executor(self._executor, tokenize)

    def text(self, prompt: pb.Prompt) -> str:
        """What a checked prompt is routed by: of a chat the last user turn."""
        return text_of(prompt, self._tokenizer)

    def _check_length(self, field: str, size: int, most: int, unit: str) -> None:
        if size > most:
            raise invalid(
                field,
                f"{size} {unit} cannot fit the context of {self._max_context} tokens; shorten it",
                "PROMPT_TOO_LONG",
            )


def text_of(prompt: pb.Prompt, tokenizer: Tokenizer) -> str:
    """What a checked prompt is routed by: of a chat the last user turn."""
    kind = prompt.WhichOneof("kind")
    if kind == "text":
        return prompt.text
    if kind == "token_ids":
        return tokenizer.decode(list(prompt.token_ids.ids))
    turns = [m.content for m in prompt.chat.messages if m.role == "user"]
    return turns[-1] if turns else prompt.chat.messages[-1].content
