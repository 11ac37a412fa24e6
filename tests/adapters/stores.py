"""Stores of objects for tests: in memory, in a directory, and S3 as moto speaks it on loopback."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
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


class Stalled:
    """A store's file system of which some calls, or all, end when this does."""

    def __init__(self, fs: Any, calls: tuple[str, ...]) -> None:
        self._fs = fs
        self._calls = calls
        self._begun = threading.Semaphore(0)
        self.go_on = threading.Event()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._fs, name)
        if not callable(attribute) or (self._calls and name not in self._calls):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            self._begun.release()
            if not self.go_on.wait(60):
                raise TimeoutError
            return attribute(*args, **kwargs)

        return call

    def wait_for(self, count: int) -> None:
        """Return when so many more calls wait."""
        for _ in range(count):
            assert self._begun.acquire(timeout=60)


@contextlib.contextmanager
def stalled(registry: Registry, *calls: str) -> Iterator[Stalled]:
    """The store does not answer this registry, some calls or all, before the end."""
    objects = objects_of(registry)
    fs = objects._fs
    store = objects._fs = Stalled(fs, calls)
    try:
        yield store
    finally:
        store.go_on.set()
        objects._fs = fs


def memory_objects(kind: type[Objects] = MemoryObjects) -> Objects:
    """Objects in a new place in memory."""
    fs, root = fsspec.core.url_to_fs(memory_url())
    return kind(fs, root)


def file_objects(directory: Path) -> FileObjects:
    """Objects in a directory."""
    fs, root = fsspec.core.url_to_fs(f"file://{directory}")
    return FileObjects(fs, root)
