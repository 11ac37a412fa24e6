"""Contents in a store of objects, each fetched into a local cache when it is first used.

The cache is a directory of blobs as ``contents`` keeps them, and checks them: what is fetched has
its SHA-256 or is not used. It holds up to some bytes, those used longest ago go first, and
processes of one machine may share it. What a store holds is written again at each registration,
so that registering a damaged content repairs it, and removed a day after nothing refers to it any
more: requests that still run on it, here or elsewhere, do not notice. Since when that is so, a mark
in the store tells whichever server looks next.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mora_serve.adapters.blobs import Buffer, Hold, is_digest
from mora_serve.adapters.contents import Contents, Health, digest_of
from mora_serve.adapters.disk import disk_errors
from mora_serve.adapters.objects import Objects
from mora_serve.adapters.quarantine import Quarantine
from mora_serve.errors import Unavailable

log = logging.getLogger(__name__)

BLOBS = "blobs"
UNREFERENCED = "unreferenced"  # the marks
UNREFERENCED_AGE = 24 * 3600.0  # seconds that a content is kept for nobody

_SPARED = 10.0  # seconds since its last use that a cached content is kept whatever its size
_AGAIN = 30.0  # seconds until a content that was damaged or missing in the store is looked for
_LOCKS = 16  # fetches of the same content wait for each other, and of few others


class _DamagedError(Exception):
    """What the store has is not what its name says."""


class SharedContents(Contents):
    """The objects below ``blobs/``, cached in ``directory``/blobs up to ``most`` bytes."""

    def __init__(
        self,
        objects: Objects,
        directory: Path,
        quarantine: Quarantine,
        most: int,
        *,
        spared: float = _SPARED,
    ) -> None:
        super().__init__(directory, quarantine)
        self._objects = objects
        self._most = most
        self._spared = spared
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._bad: dict[str, float] = {}  # by the store's doing; when they were looked at
        self._stored: frozenset[str] | None = None
        self._promised: Counter[str] = Counter()
        self._lock = threading.Lock()

    def look(self, digest: str) -> Health:
        """Have a content in the cache. Raises Unavailable, and where the cache's disk refuses."""
        if not is_digest(digest):
            return Health.MISSING
        health = self.look_here(digest)
        if health is not Health.SOUND:
            with self._locks[hash(digest) % _LOCKS], disk_errors():
                health = self.look_here(digest)  # another thread was quicker
                if health is not Health.SOUND:
                    health = self._fetch(digest)
        if health is not Health.SOUND:
            self._bad[digest] = time.monotonic()
            return health
        self._bad.pop(digest, None)
        self.blobs.used(digest)
        self._keep_promises(digest)
        self.trim()
        return health

    def here(self, digest: str) -> bool:
        """Whether it is in the cache."""
        return is_digest(digest) and (self._directory / digest).is_dir()

    def survey(self, digest: str, *, least: int, deep: bool) -> Health:
        """Whether the store has it; its sum is formed when it is fetched."""
        if self._stored is None:
            self._stored = frozenset(self._objects.folders(BLOBS))
        if digest in self._stored:
            return Health.SOUND
        self._bad[digest] = time.monotonic()
        return Health.MISSING

    def put(self, digest: str, files: Mapping[str, Buffer]) -> Hold:
        """Store the files in the cache and, whether they are there or not, in the store."""
        hold = super().put(digest, files)
        try:
            self._write(digest, files)
        except BaseException:
            hold.close()
            raise
        self._bad.pop(digest, None)
        self.trim()
        return hold

    def confirm(self, digest: str, files: Mapping[str, Buffer]) -> None:
        """Write them once more if they were removed between being written and the change."""
        try:
            stored = self._objects.sizes(f"{BLOBS}/{digest}")
            if any(stored.get(name) != len(data) for name, data in files.items()):
                self._write(digest, files)
        except Unavailable:
            log.warning("registry: content %s is registered, and was not looked at since", digest)

    def remove(self, digest: str, unreferenced: Callable[[], bool]) -> bool:
        """Drop it from the cache; ``collect`` removes it from the store."""
        return self.blobs.remove(digest, lambda: True)

    def retain(self, digest: str) -> bool:
        """Hold it in the cache, if it is there; the store keeps it for a day whatever happens."""
        if self.blobs.retain(digest):
            self.blobs.used(digest)
        else:
            with self._lock:
                self._promised[digest] += 1  # until it is here
        return True

    def release(self, digest: str) -> bool:
        """Undo one ``retain``."""
        with self._lock:
            if self._promised[digest]:
                self._promised -= Counter((digest,))
                return False
        return self.blobs.release(digest)

    def again(self, digest: str) -> bool:
        """Whether it is time to look at it once more: another server may have repaired it."""
        found = self._bad.get(digest)
        if found is not None and time.monotonic() - found < _AGAIN:
            return False
        self._bad[digest] = time.monotonic()
        return True

    def forget(self, digest: str) -> None:
        """A blob is removed."""
        super().forget(digest)
        self._bad.pop(digest, None)

    def left(self, referenced: Iterable[str]) -> list[str]:
        """None: what is cached and not referred to goes by its age."""
        return []

    def trim(self) -> None:
        """Drop what was used longest ago while the cache is too large, and nobody holds it."""
        uses = self.blobs.uses()
        total = sum(size for _, size, _ in uses)
        for used, size, digest in uses:
            if total <= self._most or time.time() - used < self._spared:
                return
            try:
                if self.blobs.remove(digest, lambda: True):
                    total -= size
            except OSError as e:
                log.warning("registry: content %s stays in the cache: %s", digest, e.strerror)

    def collect(self, referenced: Callable[[], Iterable[str]], age: float) -> int:
        """Remove what nothing has referred to for ``age`` seconds from the store.

        ``referenced`` tells what is referred to now, by whomever; what is, and is gone from the
        store, is written again where it is cached. Returns how many were removed.
        """
        stored = set(self._objects.folders(BLOBS))
        used = set(referenced())
        for digest in sorted(used - stored):
            self._write_again(digest)
        unreferenced, marked = stored - used, set(self._objects.sizes(UNREFERENCED))
        for digest in sorted(marked - unreferenced):
            self._objects.remove(_mark(digest))
        for digest in sorted(unreferenced - marked):
            self._objects.create(_mark(digest), digest.encode())
        if not unreferenced & marked:
            return 0
        before = self._objects.now() - age
        gone = 0
        for digest in sorted(unreferenced & marked):
            if not self._older([_mark(digest)], before):
                continue
            if digest in set(referenced()):  # it has been registered meanwhile
                continue
            folder = f"{BLOBS}/{digest}"
            names = [f"{folder}/{name}" for name in self._objects.sizes(folder)]
            if not self._older(names, before):  # it is being registered: that writes it again
                continue
            for name in names:
                self._objects.remove(name)
            self._objects.drop(folder)
            self._objects.remove(_mark(digest))
            gone += bool(names)
        return gone

    def _older(self, names: Iterable[str], moment: float) -> bool:
        """Whether all were written by then; not if one is gone, for another server is at it."""
        written = (self._objects.written(name) for name in names)
        return all(at is not None and at <= moment for at in written)

    def _write_again(self, digest: str) -> None:
        """Write what is gone from the store, if it is cached here."""
        hold = self.blobs.hold(digest)
        if hold is None:
            return
        with hold:
            if self._objects.sizes(f"{BLOBS}/{digest}"):
                return  # it has come since
            if self.look_here(digest) is Health.SOUND:
                log.error("registry: content %s was gone from the store; writing it again", digest)
                self._write(digest, os.listdir(self._directory / digest))

    def _keep_promises(self, digest: str) -> None:
        """Hold in the cache what was retained before it was here."""
        with self._lock:
            while self._promised[digest] and self.blobs.retain(digest):
                self._promised -= Counter((digest,))

    def _write(self, digest: str, names: Iterable[str]) -> None:
        """Write what is held in the cache to the store."""
        for name in names:
            self._objects.put(f"{BLOBS}/{digest}/{name}", self._directory / digest / name)

    def _fetch(self, digest: str) -> Health:
        found = self._objects.sizes(f"{BLOBS}/{digest}")
        names = [name for name in found if not name.startswith(".")]  # others are nobody's
        if not names:
            return Health.MISSING

        def fill(directory: Path) -> None:
            for name in names:
                if not self._objects.get(f"{BLOBS}/{digest}/{name}", directory / name):
                    raise _DamagedError
            if digest_of(directory) != digest:
                raise _DamagedError

        try:
            self.blobs.make(digest, fill).close()
        except _DamagedError:
            log.error("registry: content %s does not have its SHA-256 in the store", digest)
            return Health.DAMAGED
        return self.look_here(digest)  # a damaged one may be there that cannot be put away


def _mark(digest: str) -> str:
    return f"{UNREFERENCED}/{digest}"
