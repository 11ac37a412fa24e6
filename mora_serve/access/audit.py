"""The audit log: who changed what, and who was denied, a JSON object a line.

Every line has ``time`` (UTC), ``event``, ``request_id``, ``tenant`` and ``key`` (its id, never the
key); the rest belongs to the event. Prompts and weights are never in it.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import queue
import stat
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mora_serve.errors import ConfigError

MOST_DENIALS = 20  # lines a second, of one key or of all strangers; the next line counts the rest
_WAITING = 1024  # denials whose lines are still to be written; those beyond are counted too
_CLOSING = 2.0  # seconds for these at the end
LOGGER = "mora_serve.audit"

log = logging.getLogger(LOGGER)


class Audit:
    """Writes to a file that is appended to, or to the log where ``path`` is None.

    A file that was moved away (log rotation) is made anew. Any thread may call any method. What
    was recorded is with the operating system when the call returns; denials are written by a thread
    of their own, so that no flood of them holds up whoever denies. A disk that is full is logged
    and refuses no request: see ``failed``. Raises ConfigError for a file that cannot be written at
    first.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()  # of the file
        self._file: int | None = None
        self._torn = False  # the file ends within a line
        self.failed = 0  # lines that could not be written
        self._counts = threading.Lock()  # of what follows
        self._second = 0
        self._denials: Counter[str] = Counter()  # in this second, by key; "" is all strangers'
        self._dropped: Counter[str] = Counter()  # since the last line of a key
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._writer: threading.Thread | None = None
        if path is not None:
            try:
                self._open(path)
            except OSError as e:
                raise ConfigError(
                    f"access.audit: the file cannot be written to ({e.strerror}); give one that "
                    "this user may write to",
                    field="access.audit",
                ) from None

    def record(self, event: str, *, request_id: str, tenant: str, key: str, **more: Any) -> None:
        """Write one line."""
        text = _line(event, request_id=request_id, tenant=tenant, key=key, **more)
        if self._path is None:
            log.info("%s", text)
        else:
            self._append(text.encode())

    def denied(self, *, request_id: str, tenant: str, key: str, method: str, reason: str) -> None:
        """A call that was refused; of very many a second by one key, most are only counted.

        Strangers (an empty ``key``) count as one: their noise hides nothing that a key's holder
        does.
        """
        with self._counts:
            second = int(time.monotonic())
            if second != self._second:
                self._second = second
                self._denials.clear()
            self._denials[key] += 1
            if self._denials[key] > MOST_DENIALS or self._waiting.full():
                self._dropped[key] += 1
                return
            dropped = self._dropped.pop(key, 0)
            more = {"dropped": dropped} if dropped else {}
            text = _line(
                "denied",
                request_id=request_id,
                tenant=tenant,
                key=key,
                method=method,
                reason=reason,
                **more,
            )
            if self._path is not None:
                self._waiting.put_nowait(text.encode())  # nobody else puts
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write_denials, daemon=True)
                    self._writer.start()
                return
        log.info("%s", text)

    def close(self) -> None:
        """Write what waits, and then no more."""
        with self._counts:
            writer, self._writer = self._writer, None
        if writer is not None:
            try:
                self._waiting.put(None, timeout=_CLOSING)
            except queue.Full:  # a disk that hangs
                log.error("the audit log cannot be written in time: its newest denials are lost")
            else:
                writer.join(_CLOSING)
        with self._counts:
            dropped, self._dropped = self._dropped.total(), Counter()
        if dropped:
            log.warning("%d denials were counted and not written", dropped)
        if not self._lock.acquire(timeout=_CLOSING):
            log.error("the audit log is still being written to; it is left behind")
            return
        try:
            if self._file is not None:
                os.close(self._file)
            self._file, self._path = None, None
        finally:
            self._lock.release()

    def _write_denials(self) -> None:
        while (line := self._waiting.get()) is not None:
            self._append(line)

    def _append(self, line: bytes) -> None:
        with self._lock:
            try:
                self._write(line)
            except OSError as e:
                self.failed += 1
                log.error("the audit log cannot be written (%s): %s", e.strerror, line.decode())

    def _write(self, line: bytes) -> None:
        if self._path is None:  # closed meanwhile
            log.info("%s", line.decode())
            return
        if self._file is None or _moved(self._file, self._path):
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._open(self._path)
        if self._file is None:
            return
        line = b"\n" * self._torn + line + b"\n"
        while line:
            written = os.write(self._file, line)
            # A disk that fills leaves half a line: the next one does not become its other half.
            self._torn = line[written - 1 : written] != b"\n"
            line = line[written:]

    def _open(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o600)
        self._torn = _ends_within_a_line(path)


def _line(event: str, **more: Any) -> str:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": now, "event": event, **more})


def _ends_within_a_line(path: Path) -> bool:
    """Whether its last byte is no newline; False for what is no file, or cannot be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return False
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False


def _moved(file: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return True
    here = os.fstat(file)
    return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)
