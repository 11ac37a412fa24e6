"""Figures as text in tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"


def share(value: float | None, digits: int = 3) -> str:
    """A share between 0 and 1."""
    return NONE if value is None else f"{value:.{digits}f}"


def number(value: float | None) -> str:
    """A quantity to three digits."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(count: int) -> str:
    """Bytes in megabytes."""
    return f"{count / 1e6:.2f}"


def dig(values: Mapping[str, Any], path: str) -> Any:
    """What stands under a dotted path, or None where a part of it is missing."""
    found: Any = values
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found
