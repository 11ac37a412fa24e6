"""Work that would hold up the event loop, done on threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from mora_serve.server import call as calls
from mora_serve.server.gate import Places

T = TypeVar("T")


@dataclass(frozen=True)
class Aside:
    """Threads for one kind of work; ``places`` bounds how many calls have some there, or wait."""

    executor: Executor
    places: Places

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns. Raises what it raises, and ResourceExhausted for want of room."""
        with self.places.taken(calls.current().tenant):
            return await asyncio.get_running_loop().run_in_executor(self.executor, work)
