"""A history of numbered changes in a directory, appended by exclusive create.

``log/<number>.json`` is one change, ``snapshots/<number>.json`` the state after that change.
A file appears under its name complete and durable, by a link, and is never written again; two
processes that append meet at the link, and the later one reads on and tries again. (In an object
store a conditional put does the same.) A snapshot allows the changes up to it to be removed; that
frees their numbers, so it excludes appending by an ``flock``, which ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mora_serve.adapters.blobs import sync_directory, write_durably
from mora_serve.errors import ConfigError

_FORMAT = 1
_DIGITS = 20


class News(NamedTuple):
    """What happened after some number: ``changes`` on top of ``snapshot``.

    ``snapshot`` is None where the changes continue what the reader has. ``number`` is that of the
    last change.
    """

    number: int
    snapshot: Any | None
    changes: list[Any]


class ChangeLog:
    """The history in ``directory``/log and /snapshots. All three directories exist."""

    def __init__(self, directory: Path, temporary: Path) -> None:
        self._log = directory / "log"
        self._snapshots = directory / "snapshots"
        self._temporary = temporary

    def read(self, after: int) -> News:
        """What happened after change number ``after`` (0: everything).

        Raises ConfigError for a file that this version cannot read.
        """
        while True:
            newest = self._newest_snapshot()
            snapshot, number = None, after
            if newest > after:
                snapshot, number = self._load(self._snapshots, newest), newest
                if snapshot is None:
                    continue  # an even newer one has replaced it
            changes = []
            while (change := self._load(self._log, number + 1)) is not None:
                changes.append(change)
                number += 1
            # With a new snapshot, the end of the changes may be a hole where some were removed.
            if self._newest_snapshot() == newest:
                return News(number, snapshot, changes)

    def append(self, number: int, change: Any) -> bool:
        """Make ``change`` the one with this number; False if another one is.

        It is durable when this returns.
        """
        with self._locked(fcntl.LOCK_SH):
            if self._newest_snapshot() >= number:
                return False  # another one was, and is gone
            return self._create(self._log, number, change)

    def snapshot(self, number: int, state: Any) -> None:
        """Record the state after change ``number`` and remove what it makes superfluous.

        Does nothing while another process appends.
        """
        with contextlib.suppress(BlockingIOError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
            self._create(self._snapshots, number, state)
            for directory, end in ((self._log, number + 1), (self._snapshots, number)):
                for name in os.listdir(directory):
                    if int(name.partition(".")[0]) < end:
                        os.unlink(directory / name)

    def since_snapshot(self, number: int) -> int:
        """How many changes up to ``number`` no snapshot covers."""
        return number - self._newest_snapshot()

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        descriptor = os.open(self._log, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

    def _newest_snapshot(self) -> int:
        return max((int(name.partition(".")[0]) for name in os.listdir(self._snapshots)), default=0)

    def _create(self, directory: Path, number: int, content: Any) -> bool:
        temporary = self._temporary / uuid.uuid4().hex
        data = _encoded({"format": _FORMAT, "content": content}).encode()
        try:
            write_durably(temporary, data)
            os.link(temporary, _path(directory, number))
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(directory)
        return True

    def _load(self, directory: Path, number: int) -> Any | None:
        try:
            data = _path(directory, number).read_bytes()
        except FileNotFoundError:
            return None
        try:
            file = json.loads(data)
            if file["format"] == _FORMAT:
                return file["content"]
            why = f"it has format {file['format']}, this version reads {_FORMAT}"
        except (ValueError, KeyError, TypeError):
            why = "it is damaged"
        raise unreadable(number, why)


def unreadable(number: int, why: str = "it is damaged") -> ConfigError:
    """A file of the history that this version cannot read."""
    return ConfigError(
        f"server.state: cannot read number {number} of the registry's history: {why}; start with "
        "the version that wrote it, a backup, or another directory",
        field="server.state",
    )


def _encoded(value: Any) -> str:
    """JSON, list by list item by item: one call for thousands of records would hold Python's lock,
    and with it every other thread, for a tenth of a second.
    """
    if isinstance(value, dict):
        parts = (f"{json.dumps(key)}: {_encoded(part)}" for key, part in value.items())
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json.dumps, value)) + "]"
    return json.dumps(value)


def _path(directory: Path, number: int) -> Path:
    return directory / f"{number:0{_DIGITS}}.json"
