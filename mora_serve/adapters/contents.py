"""Contents that are what their digests say: each is looked at before it is first used.

A blob that is damaged is set aside; where the disk does not let it, it is still never used. What
was found whole is only read again when its files have changed since.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from mora_serve.adapters.blobs import BlobStore, Buffer, Hold
from mora_serve.adapters.files import CONFIG, WEIGHTS
from mora_serve.adapters.quarantine import Quarantine, means_damage
from mora_serve.adapters.validate import content_digest

_Stamp = tuple[tuple[str, int, int, int], ...]  # of each file: name, inode, size, time of change
_CHUNK = 1 << 20


class Health(enum.Enum):
    """What a look at a content found."""

    SOUND = enum.auto()
    DAMAGED = enum.auto()
    MISSING = enum.auto()


class Contents:
    """The blobs of ``directory``/blobs, checked. Any thread may call any method."""

    def __init__(self, directory: Path, quarantine: Quarantine) -> None:
        self.blobs = BlobStore(directory / "blobs", directory / "tmp")
        self._directory = directory / "blobs"
        self._quarantine = quarantine
        self._sound: dict[str, _Stamp] = {}
        self._stuck: set[str] = set()  # damaged, and not to be set aside

    def look(self, digest: str) -> Health:
        """Look at a content that is to be used, and set it aside if it is damaged."""
        return self.look_here(digest)

    def survey(self, digest: str, *, least: int, deep: bool) -> Health:
        """As ``look``, at the start. Not ``deep``: only whether its files are there, the weights of
        ``least`` bytes or more.
        """
        return self.look_here(digest, least=least, deep=deep)

    def look_here(self, digest: str, *, least: int = 0, deep: bool = True) -> Health:
        """As ``survey``, of what lies in the directory."""
        while True:
            try:
                hold = self.blobs.hold(digest)
            except OSError as e:
                if not means_damage(e):
                    raise
                hold = None  # it is there, but not to be opened
            else:
                if hold is None:
                    self._sound.pop(digest, None)
                    return Health.MISSING
            with hold or contextlib.nullcontext():
                health = self._health(digest, hold, least, deep) if hold else Health.DAMAGED
                if health is not Health.DAMAGED:
                    return health
                self._sound.pop(digest, None)
                if self._set_damaged_aside(digest, hold, deep=deep):
                    return Health.DAMAGED
            # Somebody was quicker, and may have put a whole one in its place.

    def put(self, digest: str, files: Mapping[str, Buffer]) -> Hold:
        """Store the files in place of a damaged or missing blob; held, durable when it returns."""
        if self.look_here(digest) is Health.DAMAGED and digest in self._stuck:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        hold = self.blobs.put(digest, files)
        self._sound[digest] = _stamp(hold)
        self._stuck.discard(digest)
        return hold

    def confirm(self, digest: str, files: Mapping[str, Buffer]) -> None:
        """A change that refers to a content that was put, and is held, is made."""

    def remove(self, digest: str, unreferenced: Callable[[], bool]) -> bool:
        """As ``BlobStore.remove``."""
        return self.blobs.remove(digest, unreferenced)

    def here(self, digest: str) -> bool:
        """Whether a look at it waits for no store."""
        return True

    def retain(self, digest: str) -> bool:
        """As ``BlobStore.retain``."""
        return self.blobs.retain(digest)

    def release(self, digest: str) -> bool:
        """As ``BlobStore.release``."""
        return self.blobs.release(digest)

    def again(self, digest: str) -> bool:
        """Whether somebody has put back what was damaged."""
        return digest not in self._stuck and (self._directory / digest).is_dir()

    def forget(self, digest: str) -> None:
        """A blob is removed."""
        self._sound.pop(digest, None)
        self._stuck.discard(digest)

    def set_unreferenced_aside(self, digest: str, unreferenced: Callable[[], bool]) -> None:
        """Move a blob away that nobody holds, if ``unreferenced`` still says so then."""

        def take(_: Path) -> None:
            self._set_aside(digest, "is not referred to by any change that is left")

        try:
            self.blobs.put_away(digest, unreferenced, take)
        except OSError as e:
            if not means_damage(e):
                raise
            self._set_damaged_aside(digest, None, deep=False)

    def _health(self, digest: str, hold: Hold, least: int, deep: bool) -> Health:
        """What a look at a held content finds."""
        try:
            stamp = _stamp(hold)
            if self._sound.get(digest) == stamp:
                return Health.SOUND
            if deep:
                whole = digest_of(self._directory / digest) == digest
            else:
                whole = sum(size for _, _, size, _ in stamp) > least
        except OSError as e:
            if not (isinstance(e, FileNotFoundError) or means_damage(e)):
                raise
            return Health.DAMAGED  # or gone, as shows when it is to be moved away
        if whole and deep:
            self._sound[digest] = stamp
        return Health.SOUND if whole else Health.DAMAGED

    def _set_damaged_aside(self, digest: str, hold: Hold | None, *, deep: bool) -> bool:
        """Move a blob away that was found damaged, as long as it is there; False if it is not.

        Others may hold it too: they have what they have mapped.
        """
        with self.blobs.damage():
            if hold is None:
                try:
                    again = self.blobs.hold(digest)
                except OSError as e:
                    if not means_damage(e):
                        raise
                else:
                    if again is not None:
                        again.close()
                    return False
            elif not self.blobs.same(hold, digest):
                return False
            self._set_aside(digest, "does not have its SHA-256" if deep else "is not all there")
            return True

    def _set_aside(self, digest: str, why: str) -> None:
        what = f"registry: content {digest} {why}"
        if not self._quarantine.take(self._directory / digest, what):
            self._stuck.add(digest)

    def left(self, referenced: Iterable[str]) -> list[str]:
        """The blobs that are not referred to."""
        return sorted(set(self.blobs.digests()) - set(referenced))


def router_digest(files: Mapping[str, Buffer]) -> str:
    """The digest of a router's files, by name."""
    digest = hashlib.sha256(b"mora-serve router 1\n")
    for name, data in sorted(files.items()):
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """The digest of a stored blob. Read and not mapped, so that a bad disk is an error."""
    names = os.listdir(path)
    if set(names) == {CONFIG, WEIGHTS}:
        digest = content_digest((path / CONFIG).read_bytes())
        with open(path / WEIGHTS, "rb") as file:
            for chunk in iter(functools.partial(file.read, _CHUNK), b""):
                digest.update(chunk)
        return digest.hexdigest()
    return router_digest({name: (path / name).read_bytes() for name in names})


def _stamp(hold: Hold) -> _Stamp:
    with os.scandir(hold.descriptor) as entries:
        found = [(e.name, e.stat(follow_symlinks=False)) for e in entries]
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_ctime_ns) for name, s in found))
