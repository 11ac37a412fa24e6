"""Saturation: a fixed number of clients, each asking again as soon as it has its answer."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.open_loop import percentiles, streamed
from mora_serve.client import AsyncClient
from mora_serve.errors import MoraError


@dataclass
class Saturated:
    """What came of one run; times in seconds since its start."""

    sent: list[float] = field(default_factory=list)
    first_tokens: list[float] = field(default_factory=list)  # since each request was sent
    ended: list[float] = field(default_factory=list)
    messages: list[tuple[float, int]] = field(default_factory=list)  # when, tokens
    errors: Counter[str] = field(default_factory=Counter)

    def rate(self, clients: int) -> float:
        """Tokens a second while all clients are busy.

        From when as many requests have ended as there are clients, to when the last is sent.
        """
        start, end = sorted(self.ended)[clients - 1], max(self.sent)
        return sum(n for t, n in self.messages if start < t <= end) / (end - start)

    @property
    def first_token_ms(self) -> dict[str, float]:
        """Percentiles of the time to the first token."""
        return percentiles(self.first_tokens)


async def saturate(
    client: AsyncClient, wanted: Sequence[Mapping[str, Any]], clients: int
) -> Saturated:
    """Ask for every stream of ``wanted`` (the client's keyword arguments), ``clients`` at a time.

    A MoraError, or an answer without tokens, is counted in ``errors``; else is raised.
    """
    run, line, start = Saturated(), iter(wanted), time.perf_counter()

    async def ask(options: Mapping[str, Any]) -> None:
        sent = time.perf_counter() - start
        run.sent.append(sent)
        first = None
        try:
            async for tokens in streamed(client, options):
                now = time.perf_counter() - start
                if tokens:
                    first = now if first is None else first
                    run.messages.append((now, tokens))
        except MoraError as e:
            run.errors[e.code] += 1
        else:
            if first is None:
                run.errors["EMPTY"] += 1
            else:
                run.first_tokens.append(first - sent)
        run.ended.append(time.perf_counter() - start)

    async def one() -> None:
        for options in line:
            await ask(options)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(one())
    return run
