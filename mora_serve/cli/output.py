"""Text for people: aligned tables, sizes, colours only where a terminal shows them."""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Painted(str):
    """A table cell that keeps its own escape sequences; ``plain`` is what one sees."""

    plain: str


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """``text`` in a colour if ``stream`` (stdout) is a terminal and NO_COLOR is not set."""
    out = sys.stdout if stream is None else stream
    plain = visible(text)
    if not out.isatty() or os.environ.get("NO_COLOR"):
        return plain
    painted = Painted(f"\x1b[{_CODES[colour]}m{plain}\x1b[0m")
    painted.plain = plain
    return painted


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()
) -> str:
    """Aligned columns; those in ``right`` are right-aligned.

    Cells that ``paint`` did not make have their control characters shown, not obeyed.
    """
    titles = [paint(h, "bold") for h in headers]
    lines = [titles, *([c if isinstance(c, Painted) else visible(c) for c in r] for r in rows)]
    widths = [max(width(line[i]) for line in lines) for i in range(len(headers))]

    def text(cells: Sequence[str]) -> str:
        padded = []
        for i, cell in enumerate(cells):
            space = " " * (widths[i] - width(cell))
            padded.append(space + cell if i in right else cell + space)
        return "  ".join(padded).rstrip()

    return "\n".join(text(line) for line in lines)


def width(text: str) -> int:
    """Columns that ``text`` takes in a terminal."""
    plain = text.plain if isinstance(text, Painted) else text
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in plain
    )


def shorten(text: str, columns: int) -> str:
    """``text`` on one line of at most ``columns`` columns, the cut marked by an ellipsis."""
    text = visible(text)
    if width(text) <= columns:
        return text
    kept = ""
    for c in text:
        if width(kept + c) > columns - 1:
            break
        kept += c
    return kept + "…"


def visible(text: str, keep: str = "") -> str:
    """``text`` with control characters, except those in ``keep``, shown as escapes.

    What a model or a name holds must not move the cursor or colour the terminal.
    """
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def terminal_columns() -> int:
    """Columns to print in: the terminal's, or 120 where there is none."""
    return shutil.get_terminal_size((120, 24)).columns


def megabytes(nbytes: int) -> str:
    """A size in bytes as text: 12.3 MB."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 100_000 else f"{nbytes / 1e3:.1f} kB"


def binary(nbytes: float) -> str:
    """Memory in bytes as text, in powers of 1024: 1.50 GiB."""
    return (
        f"{nbytes / (1 << 30):.2f} GiB"
        if abs(nbytes) >= 1 << 30
        else f"{nbytes / (1 << 20):.1f} MiB"
    )


def print_json(value: Any) -> None:
    """One JSON document on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)
