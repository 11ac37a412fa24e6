"""A history of numbered changes in a directory, appended by exclusive create.

``log/<number>.json`` is one change, ``snapshots/<number>.json`` the state after that change.
A file appears under its name complete and durable, by a link, and is never written again; two
processes that append meet at the link, and the later one reads on and tries again. (For a store of
objects, ``shared_log`` does the same.) A snapshot allows the changes up to the one before it to
be removed; that frees their numbers, so it excludes appending by an ``flock``, which ends with its
process.

A change stands twice in its file, in blocks of their own: a lost removal would bring back what is
not to be used. What is unreadable all the same is set aside, and reading goes on behind it: with
the snapshot before, whose changes are kept for that, or without the change that is lost. A file
that is whole, but of another version, is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from mora_serve.adapters.blobs import sync_directory, write_durably
from mora_serve.adapters.change_file import DamagedError, content_of, is_whole, packed, unreadable
from mora_serve.adapters.quarantine import Quarantine

_DIGITS = 20
_NAME = re.compile(r"00([0-9]{18})\.json")  # some numbers stay free behind any that is found
LOST = {"remove": [], "lost": True}  # a change of nothing, in the place of one that is lost

log = logging.getLogger(__name__)


class News(NamedTuple):
    """What happened after some number: ``changes`` on top of ``snapshot``.

    ``snapshot`` is None where the changes continue what the reader has. ``start`` is the
    snapshot's number, or the reader's. Changes come with their numbers, which have holes where
    some are lost.
    """

    start: int
    snapshot: Any | None
    changes: list[tuple[int, Any]]


class Log(Protocol):
    """What a history needs of a log; see ``ChangeLog``."""

    lost: bool

    def read(self, after: int) -> News:
        """What happened after a change."""

    def newer(self, after: int) -> bool:
        """Whether something happened after a change."""

    def append(self, number: int, change: Any) -> bool:
        """Make a change the one with this number."""

    def snapshot(self, number: int, state: Any, least: int = 1) -> None:
        """Record the state after a change, if so many are not covered."""

    def since_snapshot(self, number: int) -> int:
        """Changes that no snapshot covers."""

    def reject(self, number: int, *, snapshot: bool = False) -> None:
        """Set aside or pass over what means nothing."""


class ChangeLog:
    """The history in ``directory``/log and /snapshots. All three directories exist.

    ``lost`` says that changes were found to be missing: contents may be theirs then.
    """

    def __init__(self, directory: Path, temporary: Path, quarantine: Quarantine) -> None:
        self._log = directory / "log"
        self._snapshots = directory / "snapshots"
        self._temporary = temporary
        self._quarantine = quarantine
        self._passed_over: set[Path] = set()  # damaged, and the disk did not let them be set aside
        self.lost = False

    def read(self, after: int) -> News:
        """What happened after change number ``after`` (0: everything).

        Raises ConfigError for a whole file that this version cannot read.
        """
        while True:
            newest = self._newest_snapshot()
            start, snapshot = after, None
            if newest > after:
                start, snapshot = newest, self._load(self._snapshots, newest)
                if snapshot is None:
                    continue  # it is damaged, or an even newer one has replaced it
            changes, missing = self._changes(start)
            # With a new snapshot, the end of the changes may be a hole where some were removed.
            if self._newest_snapshot() == newest:
                self._tell(missing)
                return News(start, snapshot, changes)

    def newer(self, after: int) -> bool:
        """Whether there is anything after change number ``after``."""
        return os.path.lexists(_path(self._log, after + 1)) or self._newest_snapshot() > after

    def append(self, number: int, change: Any) -> bool:
        """Make ``change`` the one with this number; False if another one is.

        It is durable when this returns.
        """
        with self._locked(fcntl.LOCK_SH):
            if self._newest_snapshot() >= number:
                return False  # another one was, and is gone
            return self._create(self._log, number, change)

    def snapshot(self, number: int, state: Any, least: int = 1) -> None:
        """Record the state after change ``number`` and remove what it makes superfluous.

        The snapshot before and the changes since stay, for this one may be damaged some day.
        Does nothing while another process appends, and where one covers all but fewer than
        ``least`` changes.
        """
        with contextlib.suppress(BlockingIOError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
            before = self._newest_snapshot()
            if number - before < least:
                return  # another process was quicker
            self._create(self._snapshots, number, state)
            for directory, end in ((self._log, before + 1), (self._snapshots, before)):
                for old in _numbers(directory):
                    if old < end:
                        os.unlink(_path(directory, old))

    def since_snapshot(self, number: int) -> int:
        """How many changes up to ``number`` no snapshot covers."""
        return number - self._newest_snapshot()

    def reject(self, number: int, *, snapshot: bool = False) -> None:
        """Set a file aside that could be read, but means nothing.

        Raises ConfigError where it is as it was written: by another version.
        """
        path = _path(self._snapshots if snapshot else self._log, number)
        with contextlib.suppress(OSError):
            if is_whole(path.read_bytes()):
                raise unreadable(number, "it holds what this version does not know")
        self._set_aside(path, number, whole=True)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        descriptor = os.open(self._log, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

    def _newest_snapshot(self) -> int:
        found = _numbers(self._snapshots)
        if self._passed_over:
            found = {n for n in found if _path(self._snapshots, n) not in self._passed_over}
        return max(found, default=0)

    def _changes(self, number: int) -> tuple[list[tuple[int, Any]], list[int]]:
        """The changes behind a number, and the numbers where some are missing."""
        changes: list[tuple[int, Any]] = []
        missing: list[int] = []
        while True:
            change = self._load(self._log, number + 1)
            if change is None:
                later = [n for n in _numbers(self._log) if n > number]
                if not later:
                    return changes, missing
                if min(later) == number + 1:
                    path = _path(self._log, number + 1)
                    if path not in self._passed_over:
                        continue  # it has come since
                    changes.append((number + 1, LOST))
                else:
                    number = min(later) - 2  # the next one that there is
                missing.append(number + 1)
            else:
                if isinstance(change, dict) and change.get("lost"):
                    missing.append(number + 1)
                changes.append((number + 1, change))
            number += 1

    def _tell(self, missing: list[int]) -> None:
        if missing:
            self.lost = True
            log.error("registry: changes are lost, up to number(s) %s", missing[:10])

    def _create(self, directory: Path, number: int, content: Any) -> bool:
        path = _path(directory, number)
        temporary = self._temporary / uuid.uuid4().hex
        try:
            write_durably(temporary, packed(content, twice=directory == self._log))
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        try:
            sync_directory(directory)
        except OSError:
            # Nobody was told that it is there, so it must not be. Another process may have taken
            # it in already: it then has a change more than the disk until it starts again.
            os.unlink(path)
            raise
        return True

    def _load(self, directory: Path, number: int) -> Any | None:
        """The content of a file; None where there is none, or only a damaged one.

        A change that is damaged, and gives way, is replaced by one of nothing.
        """
        path = _path(directory, number)
        if path in self._passed_over:
            return None
        try:
            return content_of(path, number)
        except FileNotFoundError:
            return None
        except DamagedError:
            return self._set_aside(path, number)

    def _set_aside(self, path: Path, number: int, *, whole: bool = False) -> Any | None:
        """Put a damaged file away, a ``whole`` one too; returns what stands in its place."""
        kind = "snapshot" if path.parent == self._snapshots else "change"
        with self._locked(fcntl.LOCK_EX):
            if not whole:
                with contextlib.suppress(DamagedError, FileNotFoundError):
                    return content_of(path, number)  # another process was quicker
            if not self._quarantine.take(path, f"registry: {kind} number {number} is damaged"):
                self._passed_over.add(path)
                return None
            if kind == "snapshot":
                return None
            self.lost = True
            try:
                self._create(path.parent, number, LOST)
            except OSError as e:  # a hole is passed over as well
                log.warning("registry: change number %d stays missing: %s", number, e.strerror)
            return LOST


def _numbers(directory: Path) -> set[int]:
    """The numbers of a directory's files; others are nobody's."""
    return set(map(number_of, os.listdir(directory))) - {0}


def number_of(name: str) -> int:
    """The number of a file of this name; 0 for one that is nobody's."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else 0


def file_name(number: int) -> str:
    """The name of a number's file."""
    return f"{number:0{_DIGITS}}.json"


def _path(directory: Path, number: int) -> Path:
    return directory / file_name(number)
