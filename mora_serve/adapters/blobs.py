"""Content under its digest: a directory of files written once, whole or not at all.

Processes share a store. A blob that is being registered or used is held by a shared ``flock`` on
its directory, which ends with its process, however that ends; one that is removed is locked
exclusively, so that no reference to it can be made meanwhile. A damaged one may be moved away
though others hold it, by whoever holds it and ``damage``, so that it is not one put in its place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Buffer = bytes | memoryview

_DIGEST = re.compile(r"[0-9a-f]{64}")

_DIRECTORY_AGE = 60.0  # seconds from making a temporary directory to locking it, amply
_FILE_AGE = 3600.0  # seconds that writing one small temporary file may take


class Hold:
    """Keeps a blob from being removed until it is closed."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def close(self) -> None:
        """Let go; closing twice changes nothing."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class BlobStore:
    """Blobs in ``directory``; ``temporary`` is on the same file system. Both exist."""

    def __init__(self, directory: Path, temporary: Path) -> None:
        self._directory = directory
        self._temporary = temporary
        self._retained: dict[str, tuple[int, Hold]] = {}
        self._lock = threading.Lock()

    def put(self, digest: str, files: Mapping[str, Buffer]) -> Hold:
        """Store the files unless the blob is there; held either way, durable when it returns."""

        def fill(directory: Path) -> None:
            for name, data in files.items():
                write_durably(directory / name, data)

        return self.make(digest, fill)

    def make(self, digest: str, fill: Callable[[Path], None]) -> Hold:
        """As ``put``; ``fill`` writes the files into an empty directory. Raises what it raises."""
        while (held := self.hold(digest)) is None:
            temporary = tempfile.mkdtemp(dir=self._temporary)
            hold = Hold(os.open(temporary, os.O_RDONLY | os.O_DIRECTORY))
            try:
                fcntl.flock(hold.descriptor, fcntl.LOCK_SH)
                fill(Path(temporary))
                os.fsync(hold.descriptor)
                os.rename(temporary, self._directory / digest)
            except BaseException as e:
                hold.close()
                shutil.rmtree(temporary, ignore_errors=True)
                # Another was quicker, even if that blob has been removed by now.
                if isinstance(e, OSError) and e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    continue
                raise
            try:
                sync_directory(self._directory)
            except BaseException:
                hold.close()
                raise
            return hold
        return held

    def hold(self, digest: str) -> Hold | None:
        """Hold a blob, or None where there is none. Waits while its removal is being decided."""
        hold = self._open(digest)
        if hold is not None:
            fcntl.flock(hold.descriptor, fcntl.LOCK_SH)
            if not self.same(hold, digest):
                hold.close()
                return None
        return hold

    def retain(self, digest: str) -> bool:
        """Hold a blob until it is released as often; False where there is none."""
        with self._lock:
            count, hold = self._retained.get(digest, (0, None))
            hold = hold or self.hold(digest)
            if hold is not None:
                self._retained[digest] = count + 1, hold
            return hold is not None

    def release(self, digest: str) -> bool:
        """Undo one ``retain``; True if it was the last. KeyError without one."""
        with self._lock:
            count, hold = self._retained.pop(digest)
            if count > 1:
                self._retained[digest] = count - 1, hold
            else:
                hold.close()
            return count == 1

    def close(self) -> None:
        """Release everything."""
        with self._lock:
            for _, hold in self._retained.values():
                hold.close()
            self._retained.clear()

    def read(self, digest: str, name: str) -> bytes:
        """A file of a held blob. FileNotFoundError where it is not there."""
        return (self._directory / digest / name).read_bytes()

    def map(self, digest: str, name: str) -> memoryview:
        """A file of a held blob, mapped; it can be read even after the blob is removed."""
        with open(self._directory / digest / name, "rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def remove(self, digest: str, unreferenced: Callable[[], bool]) -> bool:
        """Remove a blob that nobody holds, if ``unreferenced`` still says so then.

        Returns whether the blob is gone, by whomever. ``unreferenced`` must not hold blobs.
        """
        return self.put_away(digest, unreferenced, self._trash)

    def used(self, digest: str) -> None:
        """Note that a blob is in use now."""
        with contextlib.suppress(OSError):
            os.utime(self._directory / digest)

    def uses(self) -> list[tuple[float, int, str]]:
        """All blobs: when they were used, in unix seconds, their bytes, their digests."""
        found = []
        for digest in self.digests():
            with contextlib.suppress(OSError), os.scandir(self._directory / digest) as entries:
                size = sum(entry.stat().st_size for entry in entries)
                found.append(((self._directory / digest).stat().st_mtime, size, digest))
        return sorted(found)

    def put_away(
        self, digest: str, unreferenced: Callable[[], bool], take: Callable[[Path], object]
    ) -> bool:
        """As ``remove``, but ``take`` is what makes the blob at a path go."""
        found = self._open(digest)
        if found is None:
            return True
        with found:
            try:
                fcntl.flock(found.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if not self.same(found, digest):
                return True
            if not unreferenced():
                return False
            take(self._directory / digest)
            return True

    def _trash(self, path: Path) -> None:
        trash = self._temporary / uuid.uuid4().hex  # a new name takes no room, or hardly any
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    @contextlib.contextmanager
    def damage(self) -> Iterator[None]:
        """Nobody else moves damaged blobs away inside; it waits while somebody does."""
        with Hold(os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            fcntl.flock(directory.descriptor, fcntl.LOCK_EX)
            yield

    def digests(self) -> list[str]:
        """All blobs."""
        return sorted(filter(is_digest, os.listdir(self._directory)))

    def clean(self) -> None:
        """Remove what killed processes left unfinished, and nothing that a live one writes."""
        for entry in os.scandir(self._temporary):
            with contextlib.suppress(OSError):  # gone, locked, or on a disk that takes no change
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                if not entry.is_dir(follow_symlinks=False):
                    if age > _FILE_AGE:
                        os.unlink(entry.path)
                elif age > _DIRECTORY_AGE:
                    with Hold(os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY)) as hold:
                        fcntl.flock(hold.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(entry.path, ignore_errors=True)

    def _open(self, digest: str) -> Hold | None:
        """The blob's directory, not locked yet."""
        if not is_digest(digest):
            return None
        try:
            return Hold(os.open(self._directory / digest, os.O_RDONLY | os.O_DIRECTORY))
        except FileNotFoundError:
            return None

    def same(self, hold: Hold, digest: str) -> bool:
        """Whether what is held is still the blob: it may have been removed before the lock."""
        try:
            return os.path.samestat(os.fstat(hold.descriptor), os.stat(self._directory / digest))
        except FileNotFoundError:
            return False


def is_digest(text: str) -> bool:
    """Whether a blob may have this name."""
    return _DIGEST.fullmatch(text) is not None


def write_durably(path: Path, data: Buffer) -> None:
    """Write a new file that is on the disk when this returns."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
