"""Where a registry lies: a directory of this machine, or a store that several machines share.

Both are a log of changes, contents by their digests, and room kept back for removals; what else
differs (locks, setting damaged files aside, a cache) stays behind these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, TypeVar

from mora_serve.adapters.blobs import sync_directory
from mora_serve.adapters.changelog import ChangeLog, Log
from mora_serve.adapters.contents import Contents
from mora_serve.adapters.disk import Reserve
from mora_serve.adapters.objects import open_objects
from mora_serve.adapters.quarantine import Quarantine
from mora_serve.adapters.shared_contents import UNREFERENCED_AGE, SharedContents
from mora_serve.adapters.shared_log import SharedLog
from mora_serve.errors import ConfigError

T = TypeVar("T")


class Room(Protocol):
    """Room kept back for changes that free some; see ``disk.Reserve``."""

    def take(self) -> None:
        """Have it. Raises OSError."""

    def renew(self) -> None:
        """Have it, if there is any."""

    def lend(self, work: Callable[[], T]) -> T:
        """Do what frees room in the end."""


class Storage(Protocol):
    """The parts of a registry's place."""

    log: Log
    contents: Contents
    reserve: Room

    def collect(self, referenced: Callable[[], Iterable[str]]) -> int:
        """Remove what nobody refers to any more; returns how many contents."""

    def close(self) -> None:
        """Let go of it."""


class LocalStorage:
    """A directory, or a temporary one (None).

    Raises ConfigError where it cannot be made.
    """

    log: Log
    reserve: Room

    def __init__(self, directory: Path | None) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="mora-") if directory is None else None
        root = Path(self._own.name) if self._own else Path(directory or "")
        _make_directories(root, ("blobs", "log", "snapshots", "tmp"))
        quarantine = Quarantine(root / "quarantine")
        self.contents = Contents(root, quarantine)
        self.log = ChangeLog(root, root / "tmp", quarantine)
        self.reserve = Reserve(root)

    def collect(self, referenced: Callable[[], Iterable[str]]) -> int:
        """Nothing: contents go when the last reference does."""
        return 0

    def close(self) -> None:
        """A temporary directory is gone."""
        self.contents.blobs.close()
        if self._own is not None:
            self._own.cleanup()


class SharedStorage:
    """Objects under an fsspec URL, with a cache of up to ``cache_bytes`` in a directory.

    ``cache`` None makes a temporary one. Raises ConfigError for a store that cannot be used.
    """

    log: Log
    contents: Contents
    reserve: Room

    def __init__(self, url: str, cache: Path | None, cache_bytes: int) -> None:
        self._objects = open_objects(url)
        self._own = tempfile.TemporaryDirectory(prefix="mora-") if cache is None else None
        root = Path(self._own.name) if self._own else Path(cache or "")
        _make_directories(root, ("blobs", "tmp"))
        quarantine = Quarantine(root / "quarantine")
        self._contents = SharedContents(self._objects, root, quarantine, cache_bytes)
        self.contents = self._contents
        self.log = SharedLog(self._objects)
        self.reserve = _NoRoom()

    def collect(
        self, referenced: Callable[[], Iterable[str]], age: float = UNREFERENCED_AGE
    ) -> int:
        """Remove what nothing has referred to for ``age`` seconds from the store."""
        self._objects.clean()
        if self.log.lost:
            return 0  # it may belong to a change that is lost
        return self._contents.collect(referenced, age)

    def close(self) -> None:
        """A temporary cache is gone."""
        self.contents.blobs.close()
        if self._own is not None:
            self._own.cleanup()


class _NoRoom:
    """A store has its own."""

    def take(self) -> None:
        pass

    def renew(self) -> None:
        pass

    def lend(self, work: Callable[[], T]) -> T:
        return work()


def _make_directories(root: Path, names: Iterable[str]) -> None:
    parts = (root, *(root / name for name in names))
    missing = [part for part in parts if not part.is_dir()]  # a full disk need not make the others
    try:
        for part in missing:
            part.mkdir(mode=0o700, parents=True, exist_ok=True)
        if missing:
            sync_directory(root)
    except OSError as e:
        raise ConfigError(
            f"server.state: the directory cannot be made or written to ({e.strerror}); give one "
            "that this user may write to",
            field="server.state",
        ) from None
