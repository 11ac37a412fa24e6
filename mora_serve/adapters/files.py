"""Files under the adapter root: contained, regular, capped, and read once."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from mora_serve.adapters import absent, card, header, peft_config
from mora_serve.adapters.untrusted import quoted
from mora_serve.config import AdaptersConfig
from mora_serve.errors import FailedPrecondition, InvalidArgument, MoraError, NotFound

CONFIG, WEIGHTS, CARD = peft_config.FIELD, header.FIELD, card.FILE

_FOLLOW_NO_LINK = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def check_file(name: str, limits: AdaptersConfig) -> int:
    """The most bytes that a file of this name may have.

    Raises InvalidArgument for a name that no adapter's file has, and for pickle files.
    """
    most = {CONFIG: peft_config.MAX_BYTES, WEIGHTS: limits.max_bytes, CARD: card.MAX_BYTES}
    if name in most:
        return most[name]
    if absent.is_pickle(name):
        raise absent.pickle()
    raise InvalidArgument(
        f"file: {quoted(name)} is no part of an adapter; send {CONFIG}, {WEIGHTS} and, "
        f"if there is one, {CARD}",
        field="file",
        reason="UNKNOWN_FILE",
    )


def check_size(name: str, size: int, limits: AdaptersConfig) -> None:
    """Raise InvalidArgument if a file of this name has too many bytes."""
    most = check_file(name, limits)
    if size > most:
        remedy = "lower the rank or raise adapters.max_bytes"
        raise InvalidArgument(
            f"{name}: {size} bytes are more than the {most} that are accepted; "
            f"{remedy if name == WEIGHTS else 'take out what is not needed'}",
            field=name,
            reason="TOO_LARGE",
        )


@contextlib.contextmanager
def open_directory(root: str | Path, path: str) -> Iterator[int]:
    """A descriptor of the directory ``path`` under ``root``, closed at the end.

    ``path`` is relative to ``root`` or begins with it. No component below the root may be a
    symbolic link or ``..``; each is opened from the one above it, so that nothing can be
    exchanged in between.

    Raises FailedPrecondition when no root is configured, InvalidArgument for a path that leaves
    it, NotFound for one that is not there.
    """
    if not str(root):
        raise FailedPrecondition(
            "path: this server reads no directories; set adapters.root, or upload the files",
            field="path",
            reason="NO_ROOT",
        )
    base = os.path.realpath(root)
    fd = _open(base, os.O_DIRECTORY, None)
    try:
        for part in _parts(Path(root), base, path):
            below = _open(part, os.O_DIRECTORY, fd)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def read_file(directory: int, name: str, limits: AdaptersConfig) -> bytes | None:
    """The content of an adapter's file in an open directory, or None where there is none.

    Raises InvalidArgument for a link, a special file, or one beyond its limit.
    """
    return read_regular(directory, name, name, lambda size: check_size(name, size, limits))


def read_regular(
    directory: int, name: str, field: str, check: Callable[[int], None]
) -> bytes | None:
    """The content of a regular file in an open directory, or None where there is none.

    ``check`` refuses sizes in bytes before anything is read. Raises what it raises, and
    InvalidArgument, about ``field``, for a link, a special file, or one that changes meanwhile.
    """
    try:
        fd = os.open(name, _FOLLOW_NO_LINK, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise _unreadable(field, e) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(field)
        if status.st_nlink > 1 and not _vouched(os.fstat(directory), status):
            raise _linked(field)
        check(status.st_size)
        with open(fd, "rb", closefd=False) as file:
            data = file.read(status.st_size)
        after = os.fstat(fd)
    except OSError as e:
        raise _unreadable(field, e) from None
    finally:
        os.close(fd)
    if len(data) < status.st_size or _written(after) != _written(status):
        raise InvalidArgument(
            f"{field}: the file was changed while it was read; try again when it is complete",
            field=field,
            reason="CHANGED",
        )
    return data


def _parts(root: Path, base: str, path: str) -> list[str]:
    if not path or "\0" in path:
        raise _outside("it is empty or holds a zero byte")
    pure = PurePosixPath(path)
    if pure.is_absolute():
        for start in (str(root), base):
            if pure.is_relative_to(start):
                pure = pure.relative_to(start)
                break
        else:
            raise _outside("it leaves adapters.root")
    if ".." in pure.parts:
        raise _outside("it holds '..'")
    return list(pure.parts)


def _open(name: str, flags: int, above: int | None) -> int:
    try:
        return os.open(name, _FOLLOW_NO_LINK | flags, dir_fd=above)
    except FileNotFoundError:
        if above is None:
            raise FailedPrecondition(
                "path: adapters.root, or the tenant's directory in it, does not exist on this "
                "server; create it or correct it",
                field="path",
                reason="NO_ROOT",
            ) from None
        raise NotFound(
            "path: there is no such directory under adapters.root; give one relative to it",
            field="path",
            reason="NO_DIRECTORY",
        ) from None
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _outside("a part of it is a symbolic link or no directory") from None
        if e.errno == errno.ENAMETOOLONG:
            raise _outside("a part of it is too long") from None
        raise _unreadable("path", e) from None


def _outside(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"path: {why}; give a directory under adapters.root, relative to it, without links",
        field="path",
        reason="INVALID_PATH",
    )


def _vouched(directory: os.stat_result, file: os.stat_result) -> bool:
    """Whether a file of several names is here by its own owner's doing.

    Who may write to a directory may, on some systems, link there what only the server can read.
    Where nobody but the file's owner may, the other names are harmless: installers link files.
    """
    private = not directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return directory.st_uid == file.st_uid and private


def _written(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _unreadable(name: str, error: OSError) -> MoraError:
    if error.errno == errno.ELOOP:
        return _not_regular(name)
    return FailedPrecondition(
        f"{name}: the server cannot read it ({error.strerror}); "
        "check what the server's user may read",
        field=name,
        reason="UNREADABLE",
    )


def _not_regular(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name}: it is no regular file, or a symbolic link; put the file itself there",
        field=name,
        reason="INVALID_PATH",
    )


def _linked(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name}: it is a hard link that somebody else may have made; put a copy there",
        field=name,
        reason="INVALID_PATH",
    )
