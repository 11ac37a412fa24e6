"""Whether calls are let in: not while the model loads, the server drains, or all is taken."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mora_serve.errors import MoraError, ResourceExhausted, Unavailable
from mora_serve.places import most, retry_after

_GAIN = 0.1  # weight of the newest call in how long a place is held


class State(enum.Enum):
    """A server's life."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"  # its engine is gone: the process is about to end


class Gate:
    """Knows the calls inside; lives on the event loop."""

    def __init__(self) -> None:
        self.state = State.LOADING
        self._inside: set[asyncio.Task[Any]] = set()
        self._expelled: dict[asyncio.Task[Any], MoraError] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """A call's time inside, on its task. Raises Unavailable unless the server serves.

        Also what ``expel`` is given, at the place where the call waits then.
        """
        if self.state is not State.SERVING:
            raise _closed(self.state)
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call is a task")
        self._inside.add(task)
        self._empty.clear()
        try:
            yield
        except asyncio.CancelledError:
            error = self._expelled.get(task)
            if error is None:  # the client's doing
                raise
            task.uncancel()
            raise error from None
        finally:
            self._expelled.pop(task, None)
            self._inside.discard(task)
            if not self._inside:
                self._empty.set()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in; whether all who were inside left within ``seconds``."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING
        return await self.empty(seconds)

    async def empty(self, seconds: float) -> bool:
        """Whether nobody is inside within ``seconds``."""
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def expel(self) -> int:
        """End every call inside with what those outside are told; how many there were."""
        for task in self._inside - self._expelled.keys():
            self._expelled[task] = _closed(self.state)
            task.cancel()
        return len(self._inside)

    def fail(self) -> None:
        """The engine is gone: let nobody in, and end every call inside with Unavailable."""
        self.state = State.FAILED
        self.expel()


def _closed(state: State) -> Unavailable:
    if state is State.LOADING:
        return Unavailable(
            "server: the model is still loading; try again when its health is SERVING",
            reason="LOADING",
            retry_after=1.0,
        )
    if state is State.FAILED:
        return Unavailable(
            "server: its engine has failed; send the call to another one", reason="ENGINE_FAILED"
        )
    return Unavailable(
        "server: it is shutting down; send the call to another one", reason="DRAINING"
    )


class Places:
    """A bounded number of calls at work of one kind, shared by tenants; lives on the event loop.

    A tenant may hold half of what the others leave (see ``mora_serve/places.py``). ``whose`` names
    it in messages. ``retry_seconds`` is when to come back, by default what calls hold their places.
    """

    def __init__(
        self,
        count: int,
        kind: str,
        *,
        whose: str = "this tenant",
        retry_seconds: float | None = None,
    ) -> None:
        self._count = count
        self._kind = kind
        self._whose = whose
        self._retry_seconds = retry_seconds
        self._held: Counter[str] = Counter()  # by tenant
        self._taken = 0
        self._seconds: float | None = None  # that a call held its place, lately
        self._rng = random.Random()

    @property
    def held(self) -> int:
        """How many are taken."""
        return self._taken

    @contextlib.contextmanager
    def taken(self, tenant: str = "") -> Iterator[None]:
        """A place for one call. Raises ResourceExhausted at once where there is none."""
        own = self._held[tenant]
        if own >= most(self._count, self._taken - own):
            who = self._whose if self._taken < self._count else "it"
            raise ResourceExhausted(
                f"server: {who} has as many {self._kind} at work as it takes; try again later",
                reason="BUSY",
                retry_after=retry_after(self._retry_seconds or self._seconds, self._rng),
            )
        self._held[tenant] += 1
        self._taken += 1
        start = time.monotonic()
        try:
            yield
        finally:
            self._taken -= 1
            self._held[tenant] -= 1
            if not self._held[tenant]:
                del self._held[tenant]
            seconds = time.monotonic() - start
            before = seconds if self._seconds is None else self._seconds
            self._seconds = before + _GAIN * (seconds - before)
