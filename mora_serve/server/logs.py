"""The log: lines for people or JSON objects for programs, each with the call that it is about.

A line is one line whatever its values hold: what came from outside can neither begin another
one nor reach a terminal's controls. Nothing logs a prompt or an answer.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from mora_serve.access.audit import LOGGER as AUDIT
from mora_serve.server import call as calls

_calls = logging.getLogger("mora_serve.calls")


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """Send the log of this process to ``stream`` (stderr) in a form, "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger(AUDIT).setLevel(logging.INFO)  # who did what is no question of the level


def ended(method: str, code: str, seconds: float, request_id: str, *, quiet: bool = False) -> None:
    """Log a call that has ended, at INFO; where ``quiet``, and of grpc's own services, at DEBUG."""
    level = logging.DEBUG if quiet or method.startswith("/grpc.") else logging.INFO
    if not _calls.isEnabledFor(level):
        return
    call = calls.found()
    counts = {} if call is None else call.counts
    text = f"{method} {code} in {seconds:.4f} s"
    text += "".join(f" {name}={count}" for name, count in counts.items())
    fields = {"method": method, "code": code, "seconds": round(seconds, 6), **counts}
    _calls.log(level, "%s", text, extra={"fields": fields, "request_id": request_id})


class TextFormatter(logging.Formatter):
    """Time, level, logger and message, then the call; a traceback's lines are indented."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line without its traceback."""
        call = "".join(f" {name}={value}" for name, value in _identity(record).items())
        return escaped(super().formatMessage(record) + call)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """A traceback that cannot be taken for lines of the log."""
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {escaped(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the call, and what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_identity(record),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def escaped(text: str) -> str:
    """``text`` on one line, with what does not print shown as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _identity(record: logging.LogRecord) -> dict[str, str]:
    """Request id and tenant: those that the line names, or those of the call that logs it."""
    call = calls.found()
    known = {} if call is None else {"request_id": call.request_id, "tenant": call.tenant}
    own = getattr(record, "request_id", "")
    return known | ({"request_id": own} if own else {})
