"""Takes in what other servers change in a registry that they share, every second or so."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from mora_serve.adapters.registry import Registry
from mora_serve.errors import MoraError, Unavailable

log = logging.getLogger(__name__)

COLLECT_SECONDS = 3600.0  # between looks for contents that nothing refers to any more


class Poller:
    """Threads that do so every ``seconds``, and collect, until it is closed.

    Two, for what is left to collect may take many requests, and no change waits for them.
    """

    def __init__(self, registry: Registry, seconds: float) -> None:
        self._closed = threading.Event()
        # Servers that start together take turns.
        first = random.uniform(0.1, 1.0) * COLLECT_SECONDS
        self._threads = [
            threading.Thread(target=self._run, args=args, name=f"registry-{name}", daemon=True)
            for name, *args in (
                ("poll", registry.poll, "take in others' changes", seconds, seconds),
                ("collect", registry.collect, "collect contents", first, COLLECT_SECONDS),
            )
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop; what the store does not answer to by then is left behind."""
        self._closed.set()
        end = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, work: Callable[[], object], what: str, pause: float, every: float) -> None:
        told = ""
        while not self._closed.wait(pause):
            pause, why = every, ""
            try:
                work()
            except Unavailable:
                why = told  # the store has told the log, once
            except (MoraError, OSError) as e:
                why = e.message if isinstance(e, MoraError) else e.strerror or ""
                if why != told:
                    log.error("registry: cannot %s: %s", what, why)
            except Exception:
                log.exception("registry: cannot %s", what)
            told = why
