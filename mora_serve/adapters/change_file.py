"""The file of one number of the history: JSON with a sum, a change twice.

Damage to it shows, and a file that is whole, but of another version, is told from a damaged one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from mora_serve.adapters.quarantine import means_damage
from mora_serve.errors import ConfigError

_FORMAT = 1
_BLOCK = 4096  # bytes that a disk writes, and loses, together
_SUMMED = re.compile(rb'\{"format": ([0-9]{1,9}), "sha256": "([0-9a-f]{64})", "content": ')

log = logging.getLogger(__name__)


class DamagedError(Exception):
    """No copy in a file can be read."""


def packed(content: Any, *, twice: bool = False) -> bytes:
    """A file's bytes: its content, and a sum by which damage to it shows.

    ``twice``: in blocks of their own, so that one that is lost does not matter.
    """
    data = _file(content)
    if not twice:
        return data
    first = data + b"\n"  # a lost block takes no end of line of the other copy with it
    return first.ljust(-(-len(first) // _BLOCK) * _BLOCK) + b"\n" + data


def is_whole(data: bytes) -> bool:
    """Whether a copy begins as it was written: what it says was meant."""
    return any(map(_SUMMED.match, _copies(data)))


def unreadable(number: int, why: str) -> ConfigError:
    """A file of the history that this version cannot read."""
    return ConfigError(
        f"server.state: cannot read number {number} of the registry's history: {why}; start with "
        "the version that wrote it, a backup, or another directory",
        field="server.state",
    )


def _file(content: Any) -> bytes:
    """A file of the history: its content, and a sum by which damage to it shows."""
    body = _encoded(content).encode()
    return b'{"format": %d, "sha256": "%s", "content": %s}' % (_FORMAT, _sum(_FORMAT, body), body)


def content_of(path: Path, number: int) -> Any:
    """What a file says. Raises ConfigError where another version wrote it."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise (DamagedError if means_damage(e) else e) from None  # FileNotFoundError among them
    return content_in(data, number)


def content_in(data: bytes, number: int) -> Any:
    """As ``content_of``, of a file that was read."""
    for i, copy in enumerate(_copies(data)):
        with contextlib.suppress(DamagedError):
            content = _content_of(copy, number)
            if i:
                log.error("registry: number %d is damaged in part; its copy was read", number)
            return content
    raise DamagedError


def _copies(data: bytes) -> list[bytes]:
    return [copy for line in data.split(b"\n") if (copy := line.strip(b" "))]


def _content_of(data: bytes, number: int) -> Any:
    format_ = _FORMAT
    if summed := _SUMMED.match(data):
        format_ = int(summed[1])
        if summed[2] != _sum(format_, data[summed.end() : -1]) or data[-1:] != b"}":
            raise DamagedError
    try:
        file = json.loads(data)
        content = file["content"]
        if not summed:  # an old file, or one whose beginning is damaged
            format_ = file["format"]
            if file.keys() != {"format", "content"} or type(format_) is not int:
                raise DamagedError
        if content is None:
            raise DamagedError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedError from None
    if format_ != _FORMAT:
        raise unreadable(number, f"it has format {format_}, this version reads {_FORMAT}")
    return content


def _sum(format_: int, body: bytes) -> bytes:
    return hashlib.sha256(b"%d\n%s" % (format_, body)).hexdigest().encode()


def _encoded(value: Any) -> str:
    """JSON, list by list item by item: one call for thousands of records would hold Python's lock,
    and with it every other thread, for a tenth of a second.
    """
    if isinstance(value, dict):
        parts = (f"{json.dumps(key)}: {_encoded(part)}" for key, part in value.items())
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(json.dumps, value)) + "]"
    return json.dumps(value)
