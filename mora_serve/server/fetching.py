"""Brings adapters here that are only in a shared store, before the engine needs them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Executor
from functools import partial

from mora_serve.adapters.registry import Registry


class Fetcher:
    """Fetches each content once for all who wait.

    ``executor`` waits for the store, so that the engine does not: its one loading thread serves
    everybody. ``resident`` tells what is on the device. Lives on one event loop.
    """

    def __init__(
        self, registry: Registry, executor: Executor, resident: Callable[[], Collection[str]]
    ) -> None:
        self._registry = registry
        self._executor = executor
        self._resident = resident
        self._coming: dict[str, asyncio.Future[None]] = {}

    async def fetch(self, wanted: Iterable[str]) -> None:
        """Have contents here. Raises what ``Registry.fetch`` raises."""
        away = [digest for digest in wanted if not self._registry.here(digest)]
        if away:
            resident = self._resident()
            away = [digest for digest in away if digest not in resident]
            await asyncio.gather(*(asyncio.shield(self._fetched(digest)) for digest in away))

    def _fetched(self, digest: str) -> asyncio.Future[None]:
        """A fetch under way; whoever else wants the content waits for the same."""
        coming = self._coming.get(digest)
        if coming is None:
            loop, fetch = asyncio.get_running_loop(), self._registry.fetch
            coming = loop.run_in_executor(self._executor, fetch, digest)
            self._coming[digest] = coming
            coming.add_done_callback(partial(self._came, digest))
        return coming

    def _came(self, digest: str, coming: asyncio.Future[None]) -> None:
        del self._coming[digest]
        if not coming.cancelled():
            coming.exception()  # all who waited may have left
