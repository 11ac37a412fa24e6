"""How a server's time to stop is spent, and how its process ends in time whatever hangs.

Of ``drain_seconds`` calls get most to finish. Those that do not are told so (Unavailable), and what
is left is for writing that and for closing files. Threads in the middle of something are not waited
for longer: what they change is durable in one step, or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import NoReturn

# Of the time to stop: to finish; to tell those that could not; for the last bytes of calls.
FINISHING, WRITING, LAST = 0.7, 0.1, 0.1
WAITING = 0.1  # at most, of the time to finish, in which new calls are still taken
LEAST, MOST_LAST = 0.2, 2.0  # seconds of a part, however short or long the whole
CLOSING = 10.0  # seconds for files and threads, where the process does not end before
FAILED_SECONDS = 5.0  # to end a process whose engine has failed
MARGIN = 0.25  # seconds between the hard end and the end of the time
LEAST_SECONDS = 2.0  # to end a process, however short its time to stop
ENGINE_FAILED = 3  # exit status

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Times:
    """When the parts of a stop end, in ``time.monotonic()`` seconds; ``last`` is how long."""

    finishing: float
    writing: float
    last: float
    closing: float

    @classmethod
    def of(cls, seconds: float) -> Times:
        """Beginning now."""
        now = time.monotonic()
        finishing = now + FINISHING * seconds
        writing = finishing + max(LEAST, WRITING * seconds)
        last = min(MOST_LAST, max(LEAST, LAST * seconds))
        return cls(finishing, writing, last, writing + last + CLOSING)


def left(until: float) -> float:
    """Seconds until then, not below 0."""
    return max(0.0, until - time.monotonic())


def end_after(seconds: float, status: int) -> None:
    """End the process after ``seconds``, whatever its threads do by then."""

    def end() -> None:
        log.warning("threads are still at work: the process ends without them")
        end_now(status)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def end_now(status: int) -> NoReturn:
    """End the process at once, what was logged and printed written."""
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):  # whoever read them has gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
