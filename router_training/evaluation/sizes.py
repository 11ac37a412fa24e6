"""What a bundle weighs, by part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mora_serve.router.index import Index


def measure_sizes(parts: Mapping[str, Path], whole: Path, index: Index) -> dict[str, int]:
    """Bytes on disk of the parts and of the whole directory, and of the keys in memory."""
    sizes = {name: directory_bytes(path) for name, path in parts.items()}
    return {**sizes, "whole": directory_bytes(whole), "keys": index.nbytes}


def directory_bytes(path: Path) -> int:
    """Bytes of all files under a directory."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
