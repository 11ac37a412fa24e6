"""The command line with a fault: ``python -m tests.server.faulty FAULT serve --server.port=...``.

Everything is the real server's, but for one method that a fault wraps.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

from mora_serve.cli import main
from mora_serve.engine.engine import Engine
from mora_serve.model.tokenizer import Tokenizer
from mora_serve.server.app import MoraServer
from mora_serve.server.assembly import Assembly

TOKENS = 3  # of a request, when the engine's fault happens


def engine_fault(happen: Callable[[], object]) -> None:
    """Outside of any request, in the middle of one's answer."""
    run = Engine._run

    def faulty(self: Engine, batch: Any, events: Any) -> None:
        if any(len(chunk.sequence.output) >= TOKENS for chunk in batch):
            happen()
        run(self, batch, events)

    Engine._run = faulty  # type: ignore[method-assign]


def stand_still() -> None:
    """For longer than anybody waits."""
    time.sleep(600)


def slow_tokenizer() -> None:
    """A thread that is busy for longer than the time to stop."""
    encode = Tokenizer.encode

    def faulty(self: Tokenizer, text: str) -> list[int]:
        if text.startswith("slow"):
            stand_still()
        return encode(self, text)

    Tokenizer.encode = faulty  # type: ignore[method-assign]


def slow_close() -> None:
    """What is closed at the end is never done."""
    Assembly.close = lambda self: stand_still()  # type: ignore[method-assign]


def dies_early() -> None:
    """The engine fails before the server's start has come to its end."""
    start = MoraServer.start

    async def faulty(self: MoraServer) -> None:
        await start(self)
        self._fail()
        await asyncio.sleep(600)

    MoraServer.start = faulty  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], object]] = {
    "raises": lambda: engine_fault(lambda: 1 / 0),
    "hangs": lambda: engine_fault(stand_still),
    "dies-early": dies_early,
    "slow-tokenizer": slow_tokenizer,
    "slow-close": slow_close,
}

if __name__ == "__main__":
    FAULTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
