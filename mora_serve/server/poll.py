"""Takes in what other servers change in a registry that they share, every second or so."""

from __future__ import annotations

import logging
import random
import threading
import time

from mora_serve.adapters.registry import Registry
from mora_serve.errors import MoraError, Unavailable

log = logging.getLogger(__name__)

COLLECT_SECONDS = 3600.0  # between looks for contents that nothing refers to any more


class Poller:
    """A thread that does so every ``seconds`` until it is closed."""

    def __init__(self, registry: Registry, seconds: float) -> None:
        self._registry = registry
        self._seconds = seconds
        self._closed = threading.Event()
        # Servers that start together take turns.
        self._collect_at = time.monotonic() + random.uniform(0.1, 1.0) * COLLECT_SECONDS
        self._told = ""
        self._thread = threading.Thread(target=self._run, name="registry-poll", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; what the store does not answer to by then is left behind."""
        self._closed.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._closed.wait(self._seconds):
            try:
                self._registry.poll()
                if time.monotonic() >= self._collect_at:
                    self._collect_at = time.monotonic() + COLLECT_SECONDS
                    self._registry.collect()
                self._told = ""
            except Unavailable:
                pass  # the store has told the log, once
            except (MoraError, OSError) as e:
                self._tell(e.message if isinstance(e, MoraError) else e.strerror or "")
            except Exception:
                log.exception("registry: changes of other servers were not taken in")

    def _tell(self, why: str) -> None:
        if why != self._told:
            log.error("registry: changes of other servers are not taken in: %s", why)
        self._told = why
