"""A registry that keeps up with other processes."""

from __future__ import annotations

import threading
from pathlib import Path

from benchmarks.tiny import SHAPE, adapter
from mora_serve.adapters.registry import Registry
from mora_serve.cluster.refreshing import Refresher
from mora_serve.config import AdaptersConfig


def test_what_another_writer_does_is_seen(tmp_path: Path):
    seen = threading.Event()
    with (
        Registry(tmp_path, AdaptersConfig(), SHAPE) as here,
        Registry(tmp_path, AdaptersConfig(), SHAPE) as there,
    ):
        here.subscribe(lambda change: seen.set())
        refresher = Refresher(here, 0.02)
        try:
            there.register("default", "new", adapter(1))
            assert seen.wait(30)
            assert here.get("default", "new").name == "new"
        finally:
            refresher.close()


def test_a_store_that_is_away_is_tried_again():
    tried = threading.Semaphore(0)

    class Away:
        def refresh(self) -> None:
            tried.release()
            raise OSError

    refresher = Refresher(Away(), 0.01)
    try:
        assert all(tried.acquire(timeout=30) for _ in range(3))
    finally:
        refresher.close()
