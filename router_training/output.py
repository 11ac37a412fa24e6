"""The directory that a command writes to, tried before minutes of work and not after."""

from __future__ import annotations

import os
from pathlib import Path

from mora_serve.errors import InvalidArgument


def writable(out: Path, field: str = "out") -> None:
    """Make the directory that ``field`` names. Raises InvalidArgument where it cannot be made or
    written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise unwritable(e, field) from e
    if not os.access(out, os.W_OK | os.X_OK):
        raise _wrong("Permission denied", field)


def unwritable(e: OSError, field: str = "out") -> InvalidArgument:
    """What a failure to write to it becomes."""
    return _wrong(e.strerror, field)


def _wrong(why: str | None, field: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: it cannot be written to ({why}); free some space or give another directory",
        field=field,
    )
