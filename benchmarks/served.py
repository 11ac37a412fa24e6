"""Ours in the comparisons: ``mora-serve serve`` in a process of its own, asked over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from benchmarks.workload import Mixtures, Run
from mora_serve.client import AsyncClient, Client
from mora_serve.demo.process import ServerProcess


class Served:
    """A server on the base and the adapters under ``root``; a context that stops it.

    Without a prefix cache, which the peers do not have: prompts come back.
    """

    def __init__(
        self, root: Path, adapters: Sequence[str], flags: Mapping[str, object] | None = None
    ) -> None:
        self._adapters = adapters
        self._process = ServerProcess(
            {
                "base.model": root / "base",
                "adapters.root": root / "adapters",
                "engine.prefix_cache": False,
                **(flags or {}),
            }
        )
        self._opened = ExitStack()
        self.ready_seconds = 0.0

    def __enter__(self) -> Served:
        with ExitStack() as opened:  # a server that does not get ready is stopped, too
            opened.enter_context(self._process)
            client = opened.enter_context(Client(self.address, timeout=600.0))
            self.ready_seconds = self._process.wait_until_ready(client, timeout=900.0)
            for name in self._adapters:
                client.register_adapter(name, name)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return self._process.address

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def run(self, prompts: Sequence[Sequence[int]], mixtures: Mixtures, tokens: int) -> Run:
        """All prompts at once, each a stream of its own. Raises unless every answer is whole."""
        return asyncio.run(ask_all(self.address, prompts, mixtures, tokens))


async def ask_all(
    address: str, prompts: Sequence[Sequence[int]], mixtures: Mixtures, tokens: int
) -> Run:
    """One GenerateStream a prompt, sent at the same time; times count from then."""

    async def ask(prompt: Sequence[int], mixture: dict[str, float]) -> list[tuple[int, float]]:
        got: list[tuple[int, float]] = []
        async with await client.stream(
            token_ids=prompt,
            adapters=mixture or None,
            base=not mixture,
            max_tokens=tokens,
            ignore_eos=True,
            temperature=0.0,
        ) as deltas:
            async for delta in deltas:
                now = time.perf_counter() - start
                got += [(t.id, now) for t in delta.tokens]
        return got

    async with AsyncClient(address, timeout=600.0) as client:
        await client.server_info()  # connects
        start = time.perf_counter()
        answers = await asyncio.gather(*map(ask, prompts, mixtures))
    ids = [[token for token, _ in answer] for answer in answers]
    return Run(ids, [[at for _, at in answer] for answer in answers]).check(tokens)
