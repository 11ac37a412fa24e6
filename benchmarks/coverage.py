"""Which lines of some modules have run, so that a fuzzer can keep what reaches new ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

Trace = Callable[[FrameType, str, Any], Any]


class Coverage:
    """Records lines of the files under ``package`` while it is entered, on this thread.

    A function all of whose lines have run is not looked at again, so it costs little later on.
    """

    def __init__(self, package: Path) -> None:
        self._prefix = f"{package}/"
        self._left: dict[CodeType, set[int] | None] = {}  # lines to come; None: not ours
        self._reached = 0
        self._lines = 0
        self._before: Any = None

    @property
    def reached(self) -> int:
        """Lines that have run."""
        return self._reached

    @property
    def known(self) -> int:
        """Lines of the functions that have run at all."""
        return self._lines

    def __enter__(self) -> Coverage:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Trace | None:
        code = frame.f_code
        try:
            left = self._left[code]
        except KeyError:
            left = self._left[code] = self._of(code)
        if not left:
            return None

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "line" and frame.f_lineno in left:
                left.discard(frame.f_lineno)
                self._reached += 1
            return line

        return line

    def _of(self, code: CodeType) -> set[int] | None:
        if not code.co_filename.startswith(self._prefix):
            return None
        lines = {n for _, _, n in code.co_lines() if n is not None and n != code.co_firstlineno}
        self._lines += len(lines)
        return lines
