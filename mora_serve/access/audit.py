"""The audit log: who changed what, and who was denied, a JSON object a line.

Every line has ``time`` (UTC), ``event``, ``request_id``, ``tenant`` and ``key`` (its id, never the
key); the rest belongs to the event. Prompts and weights are never in it.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from mora_serve.errors import ConfigError

MOST_DENIALS = 20  # lines a second; those beyond are counted in the next line

log = logging.getLogger(__name__)


class Audit:
    """Writes to a file that is appended to, or to the log where ``path`` is None.

    A file that was moved away (log rotation) is made anew. Any thread may call any method; a line
    is with the operating system when a call returns. A disk that is full is logged and refuses no
    request: see ``failed``. Raises ConfigError for a file that cannot be written at first.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file: int | None = None
        self._second, self._denials, self._dropped = 0, 0, 0
        self.failed = 0  # lines that could not be written
        if path is not None:
            try:
                self._file = _open(path)
            except OSError as e:
                raise ConfigError(
                    f"access.audit: the file cannot be written to ({e.strerror}); give one that "
                    "this user may write to",
                    field="access.audit",
                ) from None

    def record(self, event: str, *, request_id: str, tenant: str, key: str, **more: Any) -> None:
        """Write one line."""
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "request_id": request_id,
            "tenant": tenant,
            "key": key,
            **more,
        }
        text = json.dumps(line)
        if self._path is None:
            log.info("%s", text)
            return
        with self._lock:
            try:
                self._write(text.encode() + b"\n")
            except OSError as e:
                self.failed += 1
                log.error("the audit log cannot be written (%s): %s", e.strerror, text)

    def denied(self, *, request_id: str, tenant: str, key: str, method: str, reason: str) -> None:
        """A call that was refused; of very many a second, most are only counted."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._denials = second, 0
            self._denials += 1
            if self._denials > MOST_DENIALS:
                self._dropped += 1
                return
            dropped, self._dropped = self._dropped, 0
        more = {"dropped": dropped} if dropped else {}
        self.record(
            "denied",
            request_id=request_id,
            tenant=tenant,
            key=key,
            method=method,
            reason=reason,
            **more,
        )

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file, self._path = None, None

    def _write(self, line: bytes) -> None:
        if self._path is None:  # closed meanwhile
            return
        if self._file is None or _moved(self._file, self._path):
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._file = _open(self._path)
        while line:
            line = line[os.write(self._file, line) :]


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _moved(file: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except OSError:
        return True
    here = os.fstat(file)
    return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)
