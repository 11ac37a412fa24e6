"""Stores of objects for tests: in memory, in a directory, and S3 as moto speaks it on loopback."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mora_serve.adapters.objects import FileObjects, MemoryObjects, Objects
from mora_serve.adapters.registry import Registry
from mora_serve.adapters.storage import SharedStorage
from tests.adapters.make import LIMITS, SHAPE

_numbers = itertools.count()


def memory_url() -> str:
    """A new place in memory."""
    return f"memory://test-{next(_numbers)}/registry"


def opened(url: str, cache: Path | None = None, most: int = 1 << 30, every: int = 3) -> Registry:
    """A registry of a store."""
    return Registry(SharedStorage(url, cache, most), LIMITS, SHAPE, snapshot_every=every)


def objects_of(registry: Registry) -> Any:
    """The objects under a registry."""
    return registry._storage._objects


def go_down(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the store does not answer this registry."""

    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionError("https://secret-bucket.example/ refused")

    monkeypatch.setattr(objects_of(registry), "_fs", Gone())


def memory_objects(kind: type[Objects] = MemoryObjects) -> Objects:
    """Objects in a new place in memory."""
    fs, root = fsspec.core.url_to_fs(memory_url())
    return kind(fs, root)


def file_objects(directory: Path) -> FileObjects:
    """Objects in a directory."""
    fs, root = fsspec.core.url_to_fs(f"file://{directory}")
    return FileObjects(fs, root)
