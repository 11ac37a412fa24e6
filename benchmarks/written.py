"""What a server has written, read back: its log and its audit log, JSON a line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# grpc's own library writes to the standard error itself, about connections that spoke no HTTP/2.
_LIBRARY = re.compile(
    r"[IWEF]\d{4} \d\d:\d\d:\d\d|[IWEF]\d{4} .*\.cc:\d+\]|WARNING: All log messages"
)


@dataclass
class Written:
    """The lines of a log: those that are objects, and those that are wrong."""

    lines: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    library: int = 0  # lines of grpc's library


def read(text: str, must: Sequence[str], secrets: Sequence[str]) -> Written:
    """Read a log: each line is an object with the keys that it must have, and tells no secret."""
    found = Written()
    for line in text.split("\n"):
        if not line:
            continue
        if any(secret in line for secret in secrets):
            found.wrong.append("tells a secret: " + line[:300])
        if _LIBRARY.match(line):
            found.library += 1
            continue
        try:
            read = json.loads(line)
        except ValueError:
            read = None
        if not isinstance(read, dict) or any(key not in read for key in must):
            found.wrong.append("is no line of the log: " + line[:300])
            continue
        found.lines.append(read)
        if "exception" in read:
            found.wrong.append("a fault: " + str(read["exception"])[-1000:])
    return found
