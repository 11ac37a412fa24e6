"""What the disk's refusals mean to a caller, and room kept back for changes that free some."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from mora_serve.adapters.blobs import sync_directory
from mora_serve.errors import FailedPrecondition, MoraError, ResourceExhausted

T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESERVE_BYTES = 256 << 10  # dozens of changes: each takes a block or two and a name
RESERVE_FILES = 4

log = logging.getLogger(__name__)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise what the disk under ``server.state`` refuses as an error for callers."""
    try:
        yield
    except OSError as e:
        raise disk_error(e) from None


def disk_error(error: OSError) -> MoraError:
    """An error of the disk under ``server.state`` as callers may see it."""
    if error.errno in FULL:
        return ResourceExhausted(
            "server.state: the disk is full, nothing was changed; unregister adapters, or let the "
            "operator make room",
            field="server.state",
            reason="DISK_FULL",
        )
    return FailedPrecondition(
        f"server.state: the disk refused ({os.strerror(error.errno or 0)}), nothing was changed; "
        "let the operator look at it, then try again",
        field="server.state",
        reason="DISK_FAILED",
    )


class Reserve:
    """Files whose room is given up when a removal finds the disk full, and taken again after it.

    Several, for a file system may run out of files as well. Processes of one directory share them.
    They hold random bytes, for others may be stored in less room.
    """

    def __init__(self, directory: Path, nbytes: int = RESERVE_BYTES) -> None:
        self._paths = [directory / f"reserve-{i}" for i in range(RESERVE_FILES)]
        self._size = nbytes // RESERVE_FILES

    def take(self) -> None:
        """Have the room kept back, if it is not. Raises OSError where the disk has none."""
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_size >= self._size:
                    continue
            try:
                with open(path, "wb", opener=_private) as file:
                    file.write(os.urandom(self._size))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(path)
                raise

    def renew(self) -> None:
        """``take``, where failing changes nothing but what the log says."""
        try:
            self.take()
        except OSError as e:
            log.warning("registry: no room is kept back for removals: %s", e.strerror)

    def lend(self, work: Callable[[], T]) -> T:
        """Do what frees room in the end; with the kept room where there is no other.

        Raises what ``work`` raises.
        """
        try:
            return work()
        except OSError as e:
            if e.errno not in FULL or not self._give_up():
                raise
        return work()

    def _give_up(self) -> bool:
        given = False
        with contextlib.suppress(OSError):
            for path in self._paths:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                    given = True
            sync_directory(self._paths[0].parent)
        return given


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
