"""Access files for tests."""

from __future__ import annotations

from benchmarks.keys import add_key as key
from benchmarks.keys import bearer as authorization

__all__ = ["authorization", "key"]
