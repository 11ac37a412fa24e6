"""Notices a step that does not end: a thread beside the engine's, which looks once in a while.

It can do so only while Python's lock is free, which the native path and torch leave to others.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

LOOKS = 10  # in the seconds that a step may take
LONGEST = 1.0  # seconds between two looks


class Watchdog:
    """Calls ``stuck``, once, when a step has shown no sign of life for ``seconds``; 0: never."""

    def __init__(self, seconds: float, stuck: Callable[[], object]) -> None:
        self._seconds = seconds
        self._stuck = stuck
        self._beats = 0
        self._busy = False
        self._ended = threading.Event()

    def start(self, watched: threading.Thread) -> None:
        """Watch the steps of a thread."""
        if self._seconds:
            threading.Thread(
                target=self._watch, args=(watched,), name="watchdog", daemon=True
            ).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._ended.set()

    def beat(self) -> None:
        """The step is alive: its time begins anew."""
        self._beats += 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step's time, on the watched thread."""
        self._beats += 1
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _watch(self, watched: threading.Thread) -> None:
        pause = min(LONGEST, self._seconds / LOOKS)
        seen, waited, last = self._beats, 0.0, time.monotonic()
        while not self._ended.wait(pause):
            now = time.monotonic()
            # A process that was stopped, or a machine that slept, has not been stuck meanwhile.
            passed, last = min(now - last, 2 * pause), now
            if not self._busy or self._beats != seen:
                seen, waited = self._beats, 0.0
                continue
            waited += passed
            if waited >= self._seconds:
                log.critical(
                    "a step has taken more than %g s; the engine's thread stands at:\n%s",
                    self._seconds,
                    _stack(watched),
                )
                self._stuck()
                return


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "(it has ended)"
