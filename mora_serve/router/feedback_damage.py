"""What is broken in the files of feedback, found when they are first opened.

A line that is no JSON is copied to the quarantine and overwritten with blanks, so that positions
behind it stay what they are. A file that cannot be read is moved there as a whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from mora_serve.adapters.quarantine import Quarantine, means_damage

log = logging.getLogger(__name__)


def repaired(path: Path, quarantine: Path) -> bool:
    """Set aside what is damaged in a file, which nobody appends to meanwhile.

    False where the file as a whole is of no use.
    """
    try:
        with open(path, "rb", opener=_not_waiting) as file:
            damaged = [(offset, line) for offset, line in _lines(file) if not _whole(line)]
    except OSError as e:
        if means_damage(e):
            Quarantine(quarantine).take(path, f"feedback: file {path.name} cannot be read")
            return False
        raise
    for offset, line in damaged:
        try:
            _keep(quarantine / f"{path.stem}-{offset}", line)
            _blank(path, offset, len(line))
        except OSError as e:  # it is passed over as it is
            log.error("feedback: a damaged row cannot be set aside: %s", e.strerror)
            return True
    if damaged:
        log.error(
            "feedback: %d damaged row(s) of %s set aside in quarantine", len(damaged), path.name
        )
    return True


def _lines(file: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    offset = 0
    for line in file:
        yield offset, line.removesuffix(b"\n")
        offset += len(line)


def _whole(line: bytes) -> bool:
    """Whether a line is blank or JSON, be it of another version."""
    if not line.strip(b" "):
        return True
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _keep(path: Path, line: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError), open(path, "xb", opener=_private) as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _blank(path: Path, offset: int, nbytes: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b" " * nbytes)
        file.flush()
        os.fsync(file.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _not_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
