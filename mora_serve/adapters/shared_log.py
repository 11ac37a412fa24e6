"""A history of numbered changes in a store of objects, appended by exclusive create.

The files are those of ``changelog``, under the same names, so that a directory may be copied to a
store and back. What differs is what a store lacks: there is no lock that excludes appending while
a snapshot frees the numbers of old changes, so a change counts only if no snapshot covers its
number afterwards; and nothing is moved away: a file that is damaged stays and is passed over, by
every reader alike. The store's listing has to show what was written before it, as those of S3,
Google and Azure do.
"""

from __future__ import annotations

import logging
import time
import uuid
from typing import Any

from mora_serve.adapters.change_file import DamagedError, content_in, is_whole, packed, unreadable
from mora_serve.adapters.changelog import LOST, News, file_name, number_of
from mora_serve.adapters.objects import FIELD, Objects
from mora_serve.errors import Unavailable

log = logging.getLogger(__name__)

LOG, SNAPSHOTS = "log", "snapshots"

_FEW = 4  # changes that are read one after the other before all are listed
_LOOK_EVERY = 2.0  # seconds between looks for snapshots that a reader may have missed


class SharedLog:
    """The history in ``log/`` and ``snapshots/``.

    ``lost`` says that changes were found to be missing. Raises Unavailable where the store does
    not answer.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._passed_over: set[str] = set()  # damaged, by name
        self._covered = 0  # the newest snapshot when it was last looked for
        self._looked = time.monotonic()
        self.lost = False

    def read(self, after: int) -> News:
        """What happened after change number ``after`` (0: everything).

        Raises ConfigError for a whole file that this version cannot read.
        """
        # What lies where a snapshot has freed numbers may be a late writer's, and is nobody's.
        if after and (few := self._few(after)) and self._newest_snapshot() <= after:
            return News(after, None, few)
        while True:
            newest = self._newest_snapshot()
            start, snapshot = after, None
            if newest > after:
                start, snapshot = newest, self._load(SNAPSHOTS, newest)
                if snapshot is None:
                    continue  # it is damaged, or an even newer one has replaced it
            changes, missing = self._changes(start)
            # With a new snapshot, what is missing may have been removed for it, and what is there
            # be a late writer's.
            if self._newest_snapshot() == newest:
                self._tell(missing)
                return News(start, snapshot, changes)

    def newer(self, after: int) -> bool:
        """Whether something happened after change number ``after``; one small request.

        It is for the next change. Where that is gone, because hundreds came behind it and it was
        removed for a snapshot, this shows within seconds.
        """
        if self._objects.read(_name(LOG, after + 1)) is not None:
            return True
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return False
        return max(self._newest_snapshot(), *self._numbers(LOG), 0) > after

    def append(self, number: int, change: Any) -> bool:
        """Make ``change`` the one with this number; False if another one is.

        It is durable when this returns. Raises Unavailable where that is not known.
        """
        if self._newest_snapshot() >= number:
            return False  # another one was, and is gone
        by = {"by": uuid.uuid4().hex}  # so that no two writers' files are the same
        if not self._objects.create(_name(LOG, number), packed({**change, **by})):
            return False
        if self._newest_snapshot() >= number:
            # Hundreds of changes came in this moment. It may be one that the snapshot covers, or in
            # the place of one that was covered and removed, where nobody looks for it.
            raise Unavailable(
                f"{FIELD}: the change may or may not be made; look, and try again",
                field=FIELD,
                reason="STORE_UNAVAILABLE",
                retry_after=1.0,
            )
        return True

    def snapshot(self, number: int, state: Any, least: int = 1) -> None:
        """Record the state after change ``number`` and remove what it makes superfluous.

        The snapshot before and the changes since stay, for this one may be damaged some day.
        Does nothing where one covers all but fewer than ``least`` changes.
        """
        before = self._newest_snapshot()
        if number - before < least:
            return  # another process was quicker
        if not self._objects.create(_name(SNAPSHOTS, number), packed(state)):
            return
        for folder, end in ((LOG, before + 1), (SNAPSHOTS, before)):
            for old in sorted(self._numbers(folder)):
                if old < end:
                    self._objects.remove(_name(folder, old))

    def since_snapshot(self, number: int) -> int:
        """How many changes up to ``number`` no snapshot covers, as far as is known."""
        return number - self._covered

    def reject(self, number: int, *, snapshot: bool = False) -> None:
        """Pass a file over that could be read, but means nothing.

        Raises ConfigError where it is as it was written: by another version.
        """
        name = _name(SNAPSHOTS if snapshot else LOG, number)
        if is_whole(self._objects.read(name) or b""):
            raise unreadable(number, "it holds what this version does not know")
        self._pass_over(name)

    def _few(self, after: int) -> list[tuple[int, Any]] | None:
        """The next changes, without listing any; None where there is none, or are many."""
        changes: list[tuple[int, Any]] = []
        for number in range(after + 1, after + 2 + _FEW):
            name = _name(LOG, number)
            if (data := self._objects.read(name)) is None:
                return changes
            change = self._content(name, data, number)
            if change is None:
                self._tell([number])
            changes.append((number, LOST if change is None else change))
        return None

    def _newest_snapshot(self) -> int:
        found = self._numbers(SNAPSHOTS)
        self._covered = max(found, default=0)
        self._looked = time.monotonic()
        return self._covered

    def _numbers(self, folder: str) -> set[int]:
        """The numbers of a folder's files, damaged ones aside; others are nobody's."""
        numbers = set(map(number_of, self._objects.sizes(folder))) - {0}
        return {n for n in numbers if folder == LOG or _name(folder, n) not in self._passed_over}

    def _changes(self, start: int) -> tuple[list[tuple[int, Any]], list[int]]:
        """The changes behind a number, and the numbers where some are missing."""
        numbers = {n for n in self._numbers(LOG) if n > start}
        if not numbers:
            return [], []
        wanted = range(start + 1, max(numbers) + 1)  # a listing in parts may lack one
        read = self._objects.read_all(_name(LOG, n) for n in wanted)
        changes: list[tuple[int, Any]] = []
        missing: list[int] = []
        for number in wanted:
            name = _name(LOG, number)
            if (data := read.get(name)) is None:
                missing.append(number)
                continue
            change = self._content(name, data, number)
            if change is None:
                change = LOST
                missing.append(number)
            changes.append((number, change))
        return changes, missing

    def _load(self, folder: str, number: int) -> Any | None:
        name = _name(folder, number)
        data = self._objects.read(name)
        return None if data is None else self._content(name, data, number)

    def _content(self, name: str, data: bytes, number: int) -> Any | None:
        """What a file says; None for a damaged one, which is passed over from then on."""
        if name in self._passed_over:
            return None
        for again in (False, True):
            try:
                return content_in(data, number)
            except DamagedError:
                if not again:  # it may have been damaged on its way
                    data = self._objects.read(name) or b""
        self._pass_over(name)
        return None

    def _pass_over(self, name: str) -> None:
        self._passed_over.add(name)
        self.lost = self.lost or name.startswith(LOG)
        log.error("registry: %s is damaged in the store; it is passed over", name)

    def _tell(self, missing: list[int]) -> None:
        if missing:
            self.lost = True
            log.error("registry: changes are lost, up to number(s) %s", missing[:10])


def _name(folder: str, number: int) -> str:
    return f"{folder}/{file_name(number)}"
