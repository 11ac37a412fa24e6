"""Saturation: as many requests at a time as clients, and a rate of the busy time only."""

from __future__ import annotations

import asyncio
import statistics

import pytest

from benchmarks import closed_loop
from benchmarks.closed_loop import Saturated, saturate
from mora_serve.errors import Unavailable


def test_the_rate_leaves_out_the_start_and_the_end():
    """Tokens from when as many have ended as clients, until the last request was sent."""
    run = Saturated(sent=[0.0, 0.0, 1.0, 2.0, 4.0], ended=[1.0, 2.0, 4.0, 5.0, 9.0])
    run.messages = [(0.5, 100), (2.0, 100), (2.5, 3), (4.0, 5), (8.0, 100)]
    assert run.rate(clients=2) == 8 / 2.0


def test_clients_ask_again_until_all_is_asked(monkeypatch):
    """Never more at a time than there are; failures are counted and end nothing."""
    asking, most = 0, 0

    async def streamed(client, options):
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        await asyncio.sleep(0)
        asking -= 1
        if options["i"] % 5 == 4:
            raise Unavailable("gone", retry_after=1.0)
        for n in (0, 2, 1)[: 1 if options["i"] == 0 else 3]:
            yield n

    monkeypatch.setattr(closed_loop, "streamed", streamed)
    run = asyncio.run(saturate(None, [{"i": i} for i in range(20)], clients=3))
    assert most == 3
    assert len(run.sent) == len(run.ended) == 20
    assert run.errors == {Unavailable.code: 4, "EMPTY": 1}
    assert sum(n for _, n in run.messages) == 15 * 3
    assert len(run.first_tokens) == 15
    assert run.first_token_ms["max"] == pytest.approx(1e3 * max(run.first_tokens))
    assert run.first_token_ms["p50"] == pytest.approx(1e3 * statistics.median(run.first_tokens))
