"""The directory that a command writes to, tried before minutes of work and not after."""

from __future__ import annotations

import os
from pathlib import Path

from mora_serve.errors import InvalidArgument


def writable(out: Path) -> None:
    """Make the directory. Raises InvalidArgument where it cannot be made or written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise unwritable(e) from e
    if not os.access(out, os.W_OK | os.X_OK):
        raise _wrong("Permission denied")


def unwritable(e: OSError) -> InvalidArgument:
    """What a failure to write to it becomes."""
    return _wrong(e.strerror)


def _wrong(why: str | None) -> InvalidArgument:
    return InvalidArgument(
        f"out: it cannot be written to ({why}); give another directory", field="out"
    )
