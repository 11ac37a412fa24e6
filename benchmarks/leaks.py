"""What no status may tell of a server's insides: paths, addresses, sources, exceptions."""

from __future__ import annotations

import re
from collections.abc import Iterable

PATTERNS = {
    "traceback": re.compile(r'Traceback|File "|\bline \d+, in '),
    "path": re.compile(r"(?<![\w/:.])~?/(?:(?:[\w.+-]+/)+[\w.+-]+|[\w.+-]{2,})"),
    "source": re.compile(r"\b[\w/]+\.(?:py|pyx|pxi|cc|cpp|so)\b"),
    "memory": re.compile(
        r"\b0x[0-9a-fA-F]{5,}|<[\w.]+ object\b|<(?:function|class|bound method)\b"
    ),
    "network": re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b|\bipv[46]:"),
    "exception": re.compile(r"\b[A-Z]\w*(?:Error|Exception|Interrupt)\b"),
}


def leaks(text: str, sent: bytes = b"", secrets: Iterable[str] = ()) -> list[str]:
    """What ``text`` gives away, as "kind: the words"; what the caller ``sent`` is no secret.

    ``secrets`` are words of this server that must not occur at all.
    """
    found = [
        f"{kind}: {match.group()}"
        for kind, pattern in PATTERNS.items()
        for match in pattern.finditer(text)
        if match.group().encode() not in sent
    ]
    return found + [f"secret: {secret}" for secret in secrets if secret in text]
