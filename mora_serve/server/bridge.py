"""Between the engine's thread and asyncio: requests go in, each request's events come out.

The engine calls ``deliver`` once a step, which costs it one wake-up of the event loop and never
a wait. Events that a client has not read yet are joined, so a slow reader holds at most one
event of at most ``max_tokens`` tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol

from mora_serve.core import AdapterLoad, Event, Finish, Request, TokenOut
from mora_serve.errors import MoraError
from mora_serve.metrics import Metrics


class Submitter(Protocol):
    """What the bridge needs of an engine. Both are safe to call from any thread."""

    def submit(self, request: Request) -> Awaitable[None] | None:
        """Queue a request. Raises ResourceExhausted or InvalidArgument.

        An engine elsewhere gives what is to be awaited, and raises then.
        """

    def check_line(self, tenant: str, prompt: int, max_tokens: int, left: float | None) -> None:
        """Raise ResourceExhausted where a tenant's request finds no place, or comes too late.

        It has at least ``prompt`` tokens, and its deadline is ``left`` seconds away.
        """

    def abort(self, request_id: str, finish: Finish = Finish.CANCELLED) -> None:
        """End a request that may have ended already."""


class Generation:
    """The events of one request, in order; an async iterator and an async context.

    Leaving the context ends the request in the engine if it has not ended.
    """

    def __init__(self, bridge: Bridge, request: Request) -> None:
        self.request = request
        self._bridge = bridge
        self._tokens: list[TokenOut] = []
        self._text: list[str] = []
        self._last: Event | None = None  # the event that carries `finish`
        self._ready = asyncio.Event()
        self._over = asyncio.Event()
        self._ended = False
        self._token_time: float | None = None
        self.admission: Awaitable[None] | None = None
        self._refused = False

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bridge.close(self)

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Event:
        """What has happened since the last event, joined into one."""
        if self._ended:
            raise StopAsyncIteration
        await self._ready.wait()
        self._ready.clear()
        event = Event(self.request.id, tuple(self._tokens), "".join(self._text))
        self._tokens.clear()
        self._text.clear()
        if self._last is not None:
            self._ended = True
            event = replace(
                event, finish=self._last.finish, usage=self._last.usage, error=self._last.error
            )
        return event

    async def admitted(self) -> None:
        """Wait until the request has its place; raises what ``Bridge.submit`` raises."""
        if self.admission is None:
            return
        try:
            await self.admission
        except MoraError:
            self._refused = True
            raise

    async def gather(self, seconds: float) -> None:
        """Let events come together for so long, or until the engine has ended the request."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()

    @property
    def finished(self) -> bool:
        """Whether the engine has ended the request."""
        return self._last is not None

    @property
    def refused(self) -> bool:
        """Whether it has found no place after all."""
        return self._refused

    @property
    def last(self) -> Event | None:
        """The event with which the engine ended the request, once it has."""
        return self._last

    def push(self, event: Event, now: float, metrics: Metrics) -> None:
        """Add an event that reached the bridge at ``now`` (monotonic seconds)."""
        if event.tokens:
            if self._token_time is not None:
                metrics.tokens(len(event.tokens), now - self._token_time)
            self._token_time = now
        self._tokens += event.tokens
        if event.text:
            self._text.append(event.text)
        if event.finish is not None:
            self._last = event
            self._over.set()
        self._ready.set()


class Bridge:
    """Submits requests and hands each the events it is owed. Lives on the event loop."""

    def __init__(
        self, engine: Submitter, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._loop = loop
        self._open: dict[str, Generation] = {}
        self._numbers = itertools.count()

    def deliver(self, events: Sequence[Event | AdapterLoad]) -> None:
        """Take a step's events; for the engine's thread."""
        self._loop.call_soon_threadsafe(self._dispatch, tuple(events), time.monotonic())

    def check_line(self, tenant: str, prompt: int, max_tokens: int, left: float | None) -> None:
        """Raise what ``submit`` would for want of a place: ahead of what a request costs before."""
        self._engine.check_line(tenant, prompt, max_tokens, left)

    def submit(self, request: Request) -> Generation:
        """Queue a request under an id of its own (``request.id`` and a number).

        Raises what the engine raises.
        """
        request = replace(request, id=f"{request.id}#{next(self._numbers)}")
        generation = Generation(self, request)
        self._open[request.id] = generation
        try:
            generation.admission = self._engine.submit(request)
        except BaseException:
            del self._open[request.id]
            raise
        self._metrics.queued(request.mixture)
        return generation

    def close(self, generation: Generation) -> None:
        """The client's side has ended: so does the engine's, if it has not."""
        request = generation.request
        if not generation.finished and not generation.refused:
            late = request.deadline is not None and time.monotonic() >= request.deadline
            finish = Finish.DEADLINE if late else Finish.CANCELLED
            self._engine.abort(request.id, finish)
            self._metrics.finished(finish, None, request.mixture)
        self._open.pop(request.id, None)

    def _dispatch(self, events: Sequence[Event | AdapterLoad], now: float) -> None:
        for event in events:
            if isinstance(event, AdapterLoad):
                self._metrics.loaded(event)
                continue
            generation = self._open.get(event.request_id)
            if generation is None or generation.finished:
                continue
            generation.push(event, now, self._metrics)
            if event.finish is not None:
                self._metrics.finished(event.finish, event.usage, generation.request.mixture)
