"""A registry that keeps up with what other processes change in the same store."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

log = logging.getLogger(__name__)


class Refreshed(Protocol):
    """What is kept up to date."""

    def refresh(self) -> None:
        """Take in what others have changed."""


class Refresher:
    """Refreshes a registry every ``seconds``, on a thread of its own, until it is closed."""

    def __init__(self, registry: Refreshed, seconds: float) -> None:
        self._registry = registry
        self._seconds = seconds
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refresh", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; a look that is under way is waited for, for a moment."""
        self._closed.set()
        self._thread.join(5)

    def _run(self) -> None:
        failing = False
        while not self._closed.wait(self._seconds):
            try:
                self._registry.refresh()
                failing = False
            except Exception:
                if not failing:  # a store that is away fills no log
                    log.exception("the registry cannot be refreshed; tried again")
                failing = True
