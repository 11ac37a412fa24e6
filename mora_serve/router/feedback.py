"""Labelled prompts from callers who name their tasks, in a bounded directory of rows.

A row is one line of JSON in the newest of some numbered files, which only grow; the oldest file
goes when there is no room. A process that is killed, or a disk that fills, leaves at most an
unfinished last line: the next append ends it, and reading leaves out what is no row; the next
start sets it aside (``feedback_damage``). An ``flock`` puts the appends of several processes in one
order, so that a position, once read past, stays so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from mora_serve.adapters.blobs import sync_directory
from mora_serve.errors import ConfigError, InvalidArgument
from mora_serve.router.feedback_damage import repaired

MAX_ROW_BYTES = 1 << 16
FILES = 8  # that share the room
READ_BYTES = 1 << 18  # of a file at a time

_DIGITS = 20
_NAME = re.compile(rf"([0-9]{{{_DIGITS}}})\.jsonl")
_CURSOR = re.compile(r"([0-9a-f]{1,12})\.([0-9a-f]{1,12})")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FeedbackRow:
    """One prompt whose tasks a caller named.

    ``prompt`` is the text that the router goes by, ``adapters`` are those that ran, ``routed``
    those that the router would have picked without the hint (none where it abstains), by the
    router ``router_digest`` (empty where there was none to ask). ``time`` is in unix seconds.
    ``ranked``: a task has several adapters, so that the server chose among them and ``adapters``
    are no label.
    """

    tenant: str
    prompt: str
    tasks: tuple[str, ...]
    adapters: tuple[str, ...]
    routed: tuple[str, ...]
    router_digest: str
    base_fingerprint: str
    time: float
    ranked: bool = False  # rows of before know nothing of it

    def to_line(self) -> bytes:
        """The row's line, its end included."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> FeedbackRow | None:
        """The row of a line, or None where the line is none."""
        try:
            values = json.loads(line)
            names = {n: tuple(values[n]) for n in ("tasks", "adapters", "routed")}
            return cls(**{**values, **names})
        except (ValueError, KeyError, TypeError):
            return None


class Position(NamedTuple):
    """A place between two rows: ``offset`` bytes into the file of a number."""

    file: int = 0
    offset: int = 0

    def cursor(self) -> str:
        """The position for a caller, to whom it is opaque."""
        return f"{self.file:x}.{self.offset:x}"

    @classmethod
    def of(cls, cursor: str) -> Self:
        """The position of a cursor; an empty one is the beginning. Raises InvalidArgument."""
        if not cursor:
            return cls()
        if (match := _CURSOR.fullmatch(cursor)) is None:
            raise InvalidArgument(
                "cursor: it is none; give the one of an earlier answer, or none to begin with the "
                "oldest row",
                field="cursor",
                reason="INVALID_CURSOR",
            )
        return cls(*(int(part, 16) for part in match.groups()))


class Page(NamedTuple):
    """Some rows; ``end`` lies behind them, and ``last`` says that nothing follows yet."""

    rows: list[FeedbackRow]
    end: Position
    last: bool


class FeedbackStore:
    """Rows in ``directory``, of at most ``max_bytes`` together; None keeps them for this object.

    Any thread may call any method, and several processes may share a directory. Raises
    ConfigError where the directory cannot be made.
    """

    def __init__(self, directory: Path | None, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._own = tempfile.TemporaryDirectory(prefix="mora-") if directory is None else None
        self._directory = Path(self._own.name) if self._own else Path(directory or "")
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(
                f"server.state: the directory of feedback cannot be made ({e.strerror}); give one "
                "that this user may write to, or set router.feedback = false",
                field="server.state",
            ) from None
        self._broken: set[int] = set()  # files that are of no use
        self._set_damage_aside()

    def close(self) -> None:
        """Let go of everything; a store without a directory is gone."""
        if self._own is not None:
            self._own.cleanup()

    def append(self, rows: Sequence[FeedbackRow]) -> int:
        """Add rows; how many, for those whose line exceeds ``MAX_ROW_BYTES`` are left out.

        They are on the disk when this returns. Raises OSError where the disk does not take them;
        the first of them may have been kept then.
        """
        lines = [line for row in rows if len(line := row.to_line()) <= MAX_ROW_BYTES]
        if not lines:
            return 0
        with self._locked():
            sizes = self._sizes()
            number = max(sizes, default=0)
            size = sizes.get(number, self._max_bytes)
            pending = b""
            for line in lines:
                if size + len(pending) + len(line) >= self._max_bytes // FILES:
                    self._write(number, pending)
                    number, size, pending = max(number + 1, time.time_ns() // 1_000_000), 0, b""
                pending += line
            self._write(number, pending)
        return len(lines)

    def read(self, start: Position, tenant: str, since: float = -math.inf) -> Page:
        """The tenant's rows that follow ``start``, not older than ``since`` (unix seconds).

        It looks at about ``READ_BYTES`` and may find none of them there. Rows that have made room
        for others are passed over.
        """
        numbers = sorted(n for n in self._sizes() if n >= start.file)
        if not numbers:
            return Page([], start, True)
        number = numbers[0]
        offset = start.offset if number == start.file else 0
        try:
            with open(self._path(number), "rb") as file:
                offset = min(offset, os.fstat(file.fileno()).st_size)  # a cursor may be made up
                file.seek(offset)
                data = file.read(READ_BYTES)
        except FileNotFoundError:  # it has made room since
            return Page([], Position(number, offset), False)
        whole, end, _ = data.rpartition(b"\n")
        found = [row for line in whole.split(b"\n") if (row := FeedbackRow.from_line(line))]
        rows = [r for r in found if r.tenant == tenant and r.time >= since]
        read = len(whole) + len(end)
        if len(data) == READ_BYTES:  # longer than any row: without an end of line it is damaged
            return Page(rows, Position(number, offset + (read or READ_BYTES)), False)
        if len(numbers) > 1:
            return Page(rows, Position(numbers[1]), False)
        return Page(rows, Position(number, offset + read), True)

    def _write(self, number: int, data: bytes) -> None:
        """Append whole lines to the file of a number, after what has to go for them."""
        if not data:
            return
        self._make_room(len(data) + 1)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._path(number), flags, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                data = b"\n" + data
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if not size:
            sync_directory(self._directory)

    def _make_room(self, nbytes: int) -> None:
        sizes = self._sizes()
        used = sum(sizes.values())
        for number in sorted(sizes):
            if used + nbytes <= self._max_bytes:
                return
            os.unlink(self._path(number))
            used -= sizes[number]

    def _set_damage_aside(self) -> None:
        try:
            with self._locked():
                for number in sorted(self._sizes()):
                    if not repaired(self._path(number), self._directory / "quarantine"):
                        self._broken.add(number)
        except OSError as e:
            log.error("feedback: what is stored cannot be looked through: %s", e.strerror)

    def _sizes(self) -> dict[int, int]:
        """Bytes of each file, by number."""
        sizes = {}
        with os.scandir(self._directory) as entries:
            for entry in entries:
                match = _NAME.fullmatch(entry.name)
                if match and int(match[1]) not in self._broken:
                    with contextlib.suppress(FileNotFoundError):
                        sizes[int(match[1])] = entry.stat().st_size
        return sizes

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:0{_DIGITS}}.jsonl"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
