"""First steps with bytes and names that came from outside: what they may look like at all."""

from __future__ import annotations

import json
import re
from typing import Any

from mora_serve.errors import InvalidArgument

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MAX_QUOTED = 100


def check_name(name: str, field: str) -> str:
    """``name`` itself if it can be an adapter's, a task's or a tenant's name.

    Raises InvalidArgument otherwise.
    """
    if _NAME.fullmatch(name):
        return name
    raise InvalidArgument(
        f"{field}: {quoted(name)} is not a valid name; use 1 to 64 lower-case letters, digits, "
        "'.', '_' or '-', the first a letter or a digit",
        field=field,
        reason="INVALID_NAME",
    )


def quoted(value: object) -> str:
    """A value from outside as it may stand in a message: printable, on one line, short."""
    text = ascii(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."


def load_json(data: bytes | memoryview, field: str, *, max_bytes: int) -> dict[str, Any]:
    """Parse a JSON object from outside, strictly.

    Raises InvalidArgument if it is larger than ``max_bytes``, no UTF-8, no JSON object, nested
    beyond Python's limit, or if a key is given twice or a number is not finite.
    """
    if len(data) > max_bytes:
        raise InvalidArgument(
            f"{field}: {len(data)} bytes are more than the {max_bytes} that are read; "
            "take out what is not needed",
            field=field,
            reason="TOO_LARGE",
        )
    try:
        value = json.loads(
            str(data, "utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as e:
        detail = "nested too deeply" if isinstance(e, RecursionError) else e
        raise InvalidArgument(
            f"{field}: not valid JSON ({detail}); save the adapter again",
            field=field,
            reason="INVALID_JSON",
        ) from None
    if not isinstance(value, dict):
        raise InvalidArgument(
            f"{field}: the JSON is not an object; save the adapter again",
            field=field,
            reason="INVALID_JSON",
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
