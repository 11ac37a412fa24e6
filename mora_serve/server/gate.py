"""Whether calls are let in: not while the model loads, the server drains, or all is taken."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from collections.abc import Iterator

from mora_serve.errors import ResourceExhausted, Unavailable


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
    """A bounded number of calls at work of one kind; lives on the event loop."""

    def __init__(self, count: int, kind: str) -> None:
        self._free = count
        self._kind = kind

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """A place for one call. Raises ResourceExhausted at once where there is none."""
        if not self._free:
            raise ResourceExhausted(
                f"server: it has as many {self._kind} at work as it takes; try again later",
                reason="BUSY",
                retry_after=1.0,
            )
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1
