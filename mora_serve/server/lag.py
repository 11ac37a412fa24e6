"""Whether the event loop keeps up: how much too late its timers run."""

from __future__ import annotations

import asyncio

from mora_serve.metrics import Metrics

SECONDS = 0.05  # between two timers: some microseconds of work each


async def watch(metrics: Metrics) -> None:
    """Observe the lag of the running event loop until cancelled.

    It counts whatever keeps the loop from running: callbacks that take long, threads that hold
    Python's lock, a machine that is busy elsewhere.
    """
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + SECONDS
        await asyncio.sleep(SECONDS)
        metrics.lag(max(0.0, loop.time() - due))
