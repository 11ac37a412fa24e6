"""Named objects in a store that several machines reach, by an fsspec URL.

What a shared registry needs of a store is small: read, write, list, remove, and create a name that
must not be there yet. The last has to be atomic, and only stores where it is known to be are taken:
a conditional put in object stores (``If-None-Match: *`` at S3, ``ifGenerationMatch=0`` at Google,
no overwrite at Azure), a link in a directory, a lock in memory. Whether the store at hand honours
it is tried at the start, for some that speak S3 ignore the header.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mora_serve.adapters.blobs import sync_directory, write_durably
from mora_serve.adapters.disk import FULL, disk_error
from mora_serve.errors import ConfigError, MoraError, Unavailable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FIELD = "server.store"

# Protocols whose fsspec implementation has an atomic mode="create": read in s3fs, gcsfs and adlfs.
_CONDITIONAL = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az")
_KNOWN = "s3, gs, abfs, file and memory"
_ATTEMPTS = 3  # at an exclusive create whose outcome is not known: each may be tried again
_PAUSE = 1.0  # seconds after a failure in which reads fail at once, so that threads do not pile up
_FILE_AGE = 3600.0  # seconds that writing one temporary file may take

T = TypeVar("T")

log = logging.getLogger(__name__)


class _NotDurableError(OSError):
    """An object is there, and may be gone after a power cut."""


class Objects:
    """Objects under a URL, by names with ``/``. Any thread may call any method.

    Every method raises Unavailable, without a URL or a key in its message, where the store does
    not answer or refuses.
    """

    def __init__(self, fs: AbstractFileSystem, root: str) -> None:
        self._fs = fs
        self._root = root.rstrip("/")
        self._failed = -_PAUSE  # when the store failed last, of the monotonic clock
        self._down = False

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None where there is none."""
        return self._read(name, at_once=False)

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes of some objects, those that there are; several at a time where that helps."""
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}

        def work() -> dict[str, bytes]:
            found = self._fs.cat(list(paths), on_error="return")
            read = {}
            for path, data in found.items():
                if isinstance(data, bytes):
                    read[paths[path]] = data
                elif not isinstance(data, FileNotFoundError):
                    raise data
            return read

        return self._ask(work)

    def create(self, name: str, data: bytes) -> bool:
        """Make an object that is not there yet; False where another is. Durable when it returns.

        ``data`` is nobody else's, so that an attempt whose answer was lost is recognised. Raises
        Unavailable where it is not known whether the object was made, or will last; it is not
        taken back, for others may have read it.
        """
        for _ in range(_ATTEMPTS):
            try:
                self._create(self._path(name), data)
            except Exception as e:  # FileExistsError, or one that says nothing of the outcome
                error = e
                if isinstance(e, _NotDurableError):
                    break
                try:
                    found = self._read(name)
                except Unavailable:
                    break
                if found is not None:
                    return found == data
            else:
                self._answered()
                return True
        self._failure(error)
        raise Unavailable(
            f"{FIELD}: the store did not say whether the change is made; look, and try again",
            field=FIELD,
            reason="STORE_UNAVAILABLE",
            retry_after=_PAUSE,
        ) from error

    def put(self, name: str, path: Path) -> None:
        """Write a file's bytes, in place of an object that is there. Whole or not at all."""
        try:
            self._ask(lambda: self._put(path, self._path(name)), at_once=True)
        except FileNotFoundError as e:  # the bucket
            raise self._failure(e) from e

    def get(self, name: str, path: Path) -> bool:
        """Copy an object into a new file; False where there is none.

        Raises ResourceExhausted where the file's disk is full.
        """

        def work() -> None:
            try:
                self._fs.get_file(self._path(name), str(path))
            except OSError as e:
                raise (disk_error(e) if e.errno in FULL else e) from None

        try:
            self._ask(work)
        except FileNotFoundError:
            return False
        return True

    def sizes(self, folder: str) -> dict[str, int]:
        """The objects right in a folder: names without it, and sizes in bytes."""
        return {
            name: int(entry.get("size") or 0)
            for name, entry in self._entries(folder)
            if entry["type"] == "file"
        }

    def folders(self, folder: str) -> list[str]:
        """The folders right in a folder, without its name."""
        return [n for n, entry in self._entries(folder) if entry["type"] == "directory"]

    def written(self, name: str) -> float | None:
        """When an object was written, in seconds of the store's clock; None where it is gone."""
        try:
            return float(self._ask(lambda: self._fs.modified(self._path(name))).timestamp())
        except FileNotFoundError:
            return None

    def now(self) -> float:
        """The time, as the store stamps what is written to it: machines' clocks differ."""
        name = f"tmp/{uuid.uuid4().hex}"
        self.create(name, name.encode())
        found = self.written(name)
        self.remove(name)
        if found is None:  # somebody has emptied the folder
            raise _unavailable()
        return found

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""

        def work() -> None:
            self._fs.rm_file(self._path(name))

        try:
            self._ask(work, at_once=True)
        except FileNotFoundError:
            return

    def drop(self, folder: str) -> None:
        """An empty folder is not wanted any more, where there are such."""

    def clean(self) -> None:
        """Remove what killed processes left unfinished, where the store has such."""

    # Inside

    def _read(self, name: str, *, at_once: bool = True) -> bytes | None:
        try:
            data: bytes = self._ask(lambda: self._fs.cat_file(self._path(name)), at_once=at_once)
        except FileNotFoundError:
            return None
        return data

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _create(self, path: str, data: bytes) -> None:
        """Raises FileExistsError where the path is taken."""
        self._fs.pipe_file(path, data, mode="create")

    def _put(self, file: Path, path: str) -> None:
        self._fs.put_file(str(file), path)

    def _entries(self, folder: str) -> Iterable[tuple[str, dict[str, Any]]]:
        def work() -> list[dict[str, Any]]:
            self._fs.invalidate_cache()
            try:
                entries: list[dict[str, Any]] = self._fs.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return []
            return entries

        for entry in self._ask(work):
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if name and name != folder.rpartition("/")[2]:  # a marker of the folder itself
                yield name, entry

    def _ask(self, work: Callable[[], T], *, at_once: bool = False) -> T:
        """Do something with the store. Raises FileNotFoundError as it is, and Unavailable."""
        if not at_once and time.monotonic() - self._failed < _PAUSE:
            raise _unavailable()
        try:
            result = work()
        except FileNotFoundError:
            self._answered()
            raise
        except MoraError:
            raise
        except Exception as e:  # whatever its library raises: there is no common class
            raise self._failure(e) from e
        self._answered()
        return result

    def _failure(self, error: Exception) -> Unavailable:
        self._failed = time.monotonic()
        if not self._down:  # once, and what it is, not where: the text may have addresses in it
            self._down = True
            log.error("registry: the store does not answer, or refuses (%s)", _kind(error))
        return _unavailable()

    def _answered(self) -> None:
        if self._down:
            self._down, self._failed = False, -_PAUSE
            log.warning("registry: the store answers again")


class MemoryObjects(Objects):
    """Objects in this process's memory, for tests: fsspec looks first and writes then."""

    _lock = threading.Lock()  # the memory is the process's, and so is the lock

    def _create(self, path: str, data: bytes) -> None:
        with self._lock:
            super()._create(path, data)

    def drop(self, folder: str) -> None:
        """Remove an empty folder."""
        with contextlib.suppress(OSError):
            self._fs.rmdir(self._path(folder))


class FileObjects(Objects):
    """Objects in a directory that several machines mount: files appear whole and durable."""

    def drop(self, folder: str) -> None:
        """Remove an empty folder."""
        with contextlib.suppress(OSError):
            os.rmdir(self._path(folder))

    def clean(self) -> None:
        """Remove temporary files of killed processes."""
        before = self.now() - _FILE_AGE
        for path in Path(self._path("tmp")).iterdir():
            with contextlib.suppress(FileNotFoundError):  # its writer is ready with it
                if path.stat().st_mtime < before:
                    path.unlink()

    def _create(self, path: str, data: bytes) -> None:
        self._appear(path, lambda temporary: write_durably(temporary, data), os.link)

    def _put(self, file: Path, path: str) -> None:
        def copy(temporary: Path) -> None:
            with open(file, "rb") as source, open(temporary, "xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())

        self._appear(path, copy, os.replace)

    def _appear(
        self, path: str, write: Callable[[Path], None], how: Callable[[Path, str], None]
    ) -> None:
        """Write a file under another name and give it its own."""
        folder, temporary = Path(path).parent, Path(self._path("tmp"), uuid.uuid4().hex)
        _make(temporary.parent)
        try:
            write(temporary)
            for left in reversed(range(_ATTEMPTS)):
                _make(folder)
                try:
                    how(temporary, path)
                    break
                except FileNotFoundError:  # somebody dropped the folder
                    if not left:
                        raise
        finally:
            temporary.unlink(missing_ok=True)
        try:
            sync_directory(folder)
        except OSError as e:
            raise _NotDurableError(*e.args) from e


def open_objects(url: str) -> Objects:
    """The objects under an fsspec URL.

    Settings of the store (keys, an endpoint) are those of its library and of fsspec: environment
    variables such as AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL or FSSPEC_S3_..., and instance roles.

    Raises ConfigError for a URL that cannot be opened, and for a store that does not create
    conditionally.
    """
    try:
        import fsspec

        protocol, _, _ = url.partition("://")
        given = fsspec.config.conf.get(protocol, {})
        fs, root = fsspec.core.url_to_fs(url, **_options(protocol, given))
    except ImportError as e:
        raise ConfigError(
            f"{FIELD}: this kind of URL needs {e.name or 'a package'}, which is not installed; "
            "for s3://, pip install 'mora-serve[s3]'",
            field=FIELD,
        ) from None
    except Exception as e:
        raise ConfigError(
            f"{FIELD}: the URL cannot be opened ({type(e).__name__}); give one of {_KNOWN}, "
            "such as s3://bucket/prefix",
            field=FIELD,
        ) from None
    kinds = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if "file" in kinds:
        return _tried(FileObjects(fs, root))
    if "memory" in kinds:
        return _tried(MemoryObjects(fs, root))
    if kinds & {"s3", "s3a"}:
        fs.retries = 2  # of its own, around those of its library: a minute at a store that is gone
    if kinds & set(_CONDITIONAL):
        return _tried(Objects(fs, root))
    raise ConfigError(
        f"{FIELD}: nothing is known of a store of kind {min(kinds)!r} that creates an object only "
        f"where there is none, so that two servers could overwrite each other's changes; use one "
        f"of {_KNOWN}",
        field=FIELD,
    )


def _options(protocol: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What fsspec is told beside what is given: listings as they are now, answers in seconds."""
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in ("s3", "s3a"):
        retries = {"total_max_attempts": 2, "mode": "standard"}
        limits = {"connect_timeout": 2, "read_timeout": 10, "retries": retries}
        options["config_kwargs"] = {**limits, **given.get("config_kwargs", {})}
    return options if protocol in _CONDITIONAL else {}


def _tried(objects: Objects) -> Objects:
    """The objects, where creating a name twice fails the second time. Raises ConfigError."""
    name = f"tmp/{uuid.uuid4().hex}"
    try:
        if objects.create(name, b"1") and not objects.create(name, b"2"):
            objects.remove(name)
            return objects
        objects.remove(name)
    except Unavailable as e:
        why = f" ({_kind(e.__cause__)})" if isinstance(e.__cause__, Exception) else ""
        raise ConfigError(
            f"{FIELD}: the store cannot be reached or written to{why}; check the URL, the keys and "
            "what they allow",
            field=FIELD,
        ) from None
    raise ConfigError(
        f"{FIELD}: the store overwrites an object although it was asked to create it only where "
        "there is none; two servers could lose each other's changes: use a store with conditional "
        "writes (S3's If-None-Match)",
        field=FIELD,
    )


def _make(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_directory(folder.parent)


def _unavailable() -> Unavailable:
    return Unavailable(
        f"{FIELD}: the store of adapters does not answer; adapters that are here are served on, "
        "try the change again later",
        field=FIELD,
        reason="STORE_UNAVAILABLE",
        retry_after=_PAUSE,
    )


def _kind(error: Exception) -> str:
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}"
