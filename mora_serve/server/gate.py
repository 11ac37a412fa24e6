"""Whether calls are let in: not while the model loads, the server drains, or all is taken."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import time
from collections import Counter
from collections.abc import Iterator

from mora_serve.errors import ResourceExhausted, Unavailable
from mora_serve.places import most, retry_after

_GAIN = 0.1  # weight of the newest call in how long a place is held


class State(enum.Enum):
    """A server's life."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Gate:
    """Counts the calls inside; lives on the event loop."""

    def __init__(self) -> None:
        self.state = State.LOADING
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """A call's time inside. Raises Unavailable unless the server serves."""
        if self.state is State.LOADING:
            raise Unavailable(
                "server: the model is still loading; try again when its health is SERVING",
                reason="LOADING",
                retry_after=1.0,
            )
        if self.state is State.DRAINING:
            raise Unavailable(
                "server: it is shutting down; send the call to another one", reason="DRAINING"
            )
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def drain(self, seconds: float) -> bool:
        """Let nobody in; whether all who were inside left within ``seconds``."""
        self.state = State.DRAINING
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True


class Places:
    """A bounded number of calls at work of one kind, shared by tenants; lives on the event loop.

    A tenant may hold half of what the others leave (see ``mora_serve/places.py``).
    """

    def __init__(self, count: int, kind: str) -> None:
        self._count = count
        self._kind = kind
        self._held: Counter[str] = Counter()  # by tenant
        self._taken = 0
        self._seconds: float | None = None  # that a call held its place, lately
        self._rng = random.Random()

    @contextlib.contextmanager
    def taken(self, tenant: str = "") -> Iterator[None]:
        """A place for one call. Raises ResourceExhausted at once where there is none."""
        own = self._held[tenant]
        if own >= most(self._count, self._taken - own):
            who = "this tenant" if self._taken < self._count else "it"
            raise ResourceExhausted(
                f"server: {who} has as many {self._kind} at work as it takes; try again later",
                reason="BUSY",
                retry_after=retry_after(self._seconds, self._rng),
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
