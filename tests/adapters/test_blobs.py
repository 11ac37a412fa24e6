"""Blobs that several threads or processes store and remove at the same time."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from mora_serve.adapters.blobs import BlobStore

DIGEST = "ab" * 32


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    for name in ("blobs", "tmp"):
        (tmp_path / name).mkdir()
    return BlobStore(tmp_path / "blobs", tmp_path / "tmp")


def test_a_blob_that_came_first_and_went_again_is_stored_all_the_same(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the attempt that met it and the next look, it was removed."""
    target, rename, met = tmp_path / "blobs" / DIGEST, os.rename, []

    def late(source: str, to: Path) -> None:
        if met:
            rename(source, to)
            return
        met.append(to)
        target.mkdir()
        (target / "x").touch()
        try:
            rename(source, to)
        finally:
            shutil.rmtree(target)

    monkeypatch.setattr(os, "rename", late)
    with store.put(DIGEST, {"x": b"content"}):
        assert store.read(DIGEST, "x") == b"content"
    assert met == [target]
    assert not list((tmp_path / "tmp").iterdir())


def test_many_at_once_store_and_remove_it(store: BlobStore, tmp_path: Path) -> None:
    """Whoever holds it can read it; nothing is left in the end."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(60):
                with store.put(DIGEST, {"x": b"content"}):
                    assert store.read(DIGEST, "x") == b"content"
                store.remove(DIGEST, lambda: True)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.remove(DIGEST, lambda: True)
    assert not list((tmp_path / "blobs").iterdir())
    assert not list((tmp_path / "tmp").iterdir())
