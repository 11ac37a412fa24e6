"""Answers to completions, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mora_serve.core import Event, Finish, TokenOut, Usage
from mora_serve.http.asking import Question, named
from mora_serve.http.forms import (
    Envelope,
    Json,
    decision_object,
    timings_object,
    usage_object,
)
from mora_serve.http.tokens import TokenTexts
from mora_serve.server.answers import Answers, Running, end_of, in_pieces
from mora_serve.server.bridge import Generation

DONE = b"data: [DONE]\n\n"
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # proxies pass it on at once


@dataclass(frozen=True)
class Writer:
    """Writes what is asked for; ``stream_usage``: a stream ends with the counts of its tokens.

    ``executor`` is for work that would hold up the event loop.
    """

    answers: Answers
    texts: TokenTexts
    question: Question
    envelope: Envelope
    executor: Executor
    stream_usage: bool = False

    async def whole(self) -> Response:
        """The answer as one object."""
        runs: list[_Told] = []
        with named(self.question.names):
            async with self._running() as running:
                for run, echo in zip(running, self._echoes(running), strict=True):
                    told = _Told(run, echo)
                    for generation in run.generations:
                        text: list[str] = []
                        tokens: list[TokenOut] = []
                        async for event in generation:
                            text.append(event.text)
                            tokens += event.tokens
                            if event.finish is not None:
                                finish, usage = end_of(event)
                        told.answers.append(
                            _Answer(generation, "".join(text), tokens, finish, usage)
                        )
                    runs.append(told)
        if runs[0].answers[0].generation.request.sampling.logprobs is None:
            return self._written(runs)
        # Very many numbers: not on the event loop.
        return await asyncio.get_running_loop().run_in_executor(self.executor, self._written, runs)

    def _written(self, runs: Sequence[_Told]) -> Response:
        form = self.envelope.form
        choices: list[Json] = []
        for told in runs:
            for answer in told.answers:
                logprobs = None
                if answer.generation.request.sampling.logprobs is not None:
                    logprobs = form.logprobs(answer.tokens, self.texts, len(told.echo))
                text = told.echo + answer.text
                choice = form.choice(len(choices), text, logprobs, answer.finish.value)
                if len(runs) > 1:
                    choice["mora"] = _mora(told.run, answer.generation, answer.usage)
                choices.append(choice)
        more: Json = {"usage": usage_object([a.usage for a in told.answers] for told in runs)}
        if len(runs) == 1:
            first = runs[0].answers[0]
            more["mora"] = _mora(runs[0].run, first.generation, first.usage)
        return JSONResponse(self.envelope.whole(choices, **more))

    async def chunks(self) -> AsyncGenerator[Json]:
        """The answer piece by piece."""
        form = self.envelope.form
        with named(self.question.names):
            async with self._running() as runs:
                alone = len(runs) == 1
                usages: list[list[Usage]] = [[] for _ in runs]
                # An answer's index is its place here; its prompt's is the first of the pair.
                places: list[tuple[int, Generation]] = []
                for number, (run, echo) in enumerate(zip(runs, self._echoes(runs), strict=True)):
                    for generation in run.generations:
                        first = form.first(len(places))
                        yield self._chunk(first, _mora(run, generation), alone=alone)
                        if echo:
                            yield self._chunk(form.delta(len(places), echo, None))
                        places.append((number, generation))
                offsets = [0] * len(places)
                async for i, event in merged([generation for _, generation in places]):
                    number, generation = places[i]
                    if event.finish is not None:
                        finish, usage = end_of(event)
                        usages[number].append(usage)
                    for text, tokens in in_pieces(event):
                        logprobs = None
                        if generation.request.sampling.logprobs is not None:
                            logprobs = form.logprobs(tokens, self.texts, offsets[i])
                            offsets[i] += sum(len(self.texts.text_of(t.id)) for t in tokens)
                        if text or logprobs is not None:
                            yield self._chunk(form.delta(i, text, logprobs))
                    if event.finish is not None:
                        mora = {"timings": timings_object(usage)}
                        yield self._chunk(form.last(i, finish.value), mora, alone=alone)
        if self.stream_usage:
            yield self.envelope.chunk([], usage=usage_object(usages))

    def _chunk(self, choice: Json, mora: Json | None = None, *, alone: bool = True) -> Json:
        """A piece of a stream; ``mora`` is the whole's where there is one prompt ``alone``."""
        more: Json = {"usage": None} if self.stream_usage else {}
        if mora is not None and alone:
            more["mora"] = mora
        elif mora is not None:
            choice = {**choice, "mora": mora}
        return self.envelope.chunk([choice], **more)

    def _echoes(self, runs: Sequence[Running]) -> Sequence[str]:
        return self.question.echo or [""] * len(runs)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[list[Running]]:
        async with AsyncExitStack() as stack:
            yield [
                await stack.enter_async_context(self.answers.running(asked))
                for asked in self.question.asked
            ]


@dataclass(frozen=True)
class _Answer:
    """One answer that is complete."""

    generation: Generation
    text: str
    tokens: Sequence[TokenOut]
    finish: Finish
    usage: Usage


@dataclass(frozen=True)
class _Told:
    """The answers of one prompt, and what stands before each of them."""

    run: Running
    echo: str
    answers: list[_Answer] = field(default_factory=list)


def _mora(run: Running, generation: Generation, usage: Usage | None = None) -> Json:
    mora = decision_object(run.decision) | {"seed": generation.request.sampling.seed}
    return mora if usage is None else {**mora, "timings": timings_object(usage)}


class EventStream(Response):
    """Server-sent events, a JSON object each, and ``[DONE]``.

    Nothing is sent before there is a first event: what fails until then is an error's answer.
    """

    def __init__(self, chunks: AsyncGenerator[Json]) -> None:
        super().__init__(media_type="text/event-stream", headers=_HEADERS)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        started = False
        async with aclosing(self._chunks):
            async for chunk in self._chunks:
                if not started:
                    headers = [(k, v) for k, v in self.raw_headers if k != b"content-length"]
                    start = {"type": "http.response.start", "status": 200, "headers": headers}
                    await send(start)
                    started = True
                data = json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))
                await send(_part(b"data: " + data.encode() + b"\n\n"))
        await send({**_part(DONE), "more_body": False})


def _part(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


async def merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several answers as they come, with their numbers."""
    if len(generations) == 1:
        async for event in generations[0]:
            yield 0, event
        return
    pending = {asyncio.ensure_future(_next(g)): i for i, g in enumerate(generations)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=pending.__getitem__):
                i, event = pending.pop(task), task.result()
                yield i, event
                if event.finish is None:
                    pending[asyncio.ensure_future(_next(generations[i]))] = i
    finally:
        for task in pending:
            task.cancel()


async def _next(generation: Generation) -> Event:
    return await anext(generation)
