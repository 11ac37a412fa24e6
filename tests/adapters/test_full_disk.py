"""A disk that fills in the middle of a change: it is refused, or made, and never half made."""

from __future__ import annotations

import builtins
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mora_serve.adapters import blobs, disk
from mora_serve.adapters.disk import Reserve, disk_error
from mora_serve.adapters.registry import Registry
from mora_serve.errors import ResourceExhausted
from tests.adapters.make import LIMITS, SHAPE, adapter

GROWING = ("fsync", "link", "rename", "mkdir", "write")


def opened(state: Path) -> Registry:
    return Registry(state, LIMITS, SHAPE, snapshot_every=2)


def summary(registry: Registry) -> Any:
    records = [
        (r.tenant, r.name, r.version, r.digest, r.pinned, r.card)
        for tenant in ("default", "other")
        for r in registry.list(tenant)
    ]
    return records, registry.router()


class Disk:
    """The real disk, which takes nothing more from its ``left``-th operation on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 1 << 30
        self.refused = 0
        for name in GROWING[:-1]:
            monkeypatch.setattr(os, name, self._limited(getattr(os, name)))
        monkeypatch.setattr(tempfile, "mkdtemp", self._limited(tempfile.mkdtemp))
        for module in (blobs, disk):
            monkeypatch.setattr(module, "open", self._open, raising=False)

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    def _limited(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*args: Any, **options: Any) -> Any:
            self.take()
            return work(*args, **options)

        return limited

    def _open(self, *args: Any, **options: Any) -> Any:
        file = builtins.open(*args, **options)  # noqa: SIM115  (its caller closes it)
        if file.mode in ("xb", "wb"):
            file = Writer(file, self)
        return file


class Writer:
    """A new file of which the disk may take a half."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: bytes) -> None:
        try:
            self._disk.take()
        except OSError:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise
        self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


CHANGES: dict[str, Callable[[Registry], object]] = {
    "registration": lambda r: r.register("default", "new", adapter(3)),
    "registration of a known content": lambda r: r.register("default", "new", adapter(1)),
    "replacement": lambda r: r.register("default", "a", adapter(3), replace=True),
    "removal": lambda r: r.unregister("default", "a"),
    "card": lambda r: r.update("default", "a", tasks=["u"]),
    "pin": lambda r: r.pin("default", "a", True),
    "router": lambda r: r.set_router({"r": b"2"}),
}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    with opened(tmp_path / "state") as registry:
        registry.register("default", "a", adapter(1), tasks=["t"])
        registry.register("other", "b", adapter(2))
        registry.set_router({"r": b"1"})
    yield tmp_path / "state"
    with opened(tmp_path / "state") as registry:
        for tenant in ("default", "other"):
            for record in registry.list(tenant):
                assert registry.open(record.digest).digest == record.digest
        assert not (tmp_path / "state" / "quarantine").exists()


@pytest.mark.parametrize("kind", CHANGES)
def test_a_disk_that_fills_at_any_operation_of_a_change(
    state: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever operation is the first that the disk refuses, a change that raises is not there,
    not even for who opens the state anew, and one that returns is.
    """
    disk = Disk(monkeypatch)
    refusals: set[tuple[str, str]] = set()
    for number in range(100):
        disk.left = 1 << 30
        with opened(state) as registry:
            before = summary(registry)
            disk.left, disk.refused = number, 0
            try:
                CHANGES[kind](registry)
            except ResourceExhausted as e:
                error = (e.reason, e.field)
                assert summary(registry) == before
                with opened(state) as again:  # on the full disk
                    assert summary(again) == before
                refusals.add(error)
            else:
                after, refused = summary(registry), disk.refused
                assert after != before
                with opened(state) as again:
                    assert summary(again) == after
                if not refused:
                    assert number > 3
                    assert refusals == {("DISK_FULL", "server.state")}
                    return
                undo(registry, disk)
            disk.left = 1 << 30
        with opened(state) as again:  # nothing is left of what was refused, nor held
            records, _ = summary(again)
            assert len(os.listdir(state / "blobs")) == len({r[3] for r in records}) + 1
    raise AssertionError


def undo(registry: Registry, disk: Disk) -> None:
    """Bring the registry back to where each attempt begins."""
    disk.left = 1 << 30
    registry.register("default", "a", adapter(1), tasks=["t"], replace=True)
    registry.update("default", "a", tasks=["t"])
    registry.pin("default", "a", False)
    registry.set_router({"r": b"1"})
    if any(r.name == "new" for r in registry.list("default")):
        registry.unregister("default", "new")


def test_the_reserve_makes_a_removal_possible(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its room is given up, and kept back anew when there is some, before a registration's."""
    room, full = [False], OSError(errno.ENOSPC, "No space left on device")
    link, write = os.link, os.fsync

    def reserves() -> list[Path]:
        return sorted(state.glob("reserve-*"))

    def needs_room(work: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*args: Any) -> Any:
            if not room[0] and reserves():
                raise full
            return work(*args)

        return limited

    with opened(state) as registry:
        assert sum(p.stat().st_size for p in reserves()) == disk.RESERVE_BYTES
        monkeypatch.setattr(os, "link", needs_room(link))
        monkeypatch.setattr(os, "fsync", needs_room(write))
        with pytest.raises(ResourceExhausted):
            registry.register("default", "new", adapter(3))
        registry.unregister("default", "a")
        assert registry.list("default") == ()
        assert not reserves()
        with pytest.raises(ResourceExhausted):
            registry.register("default", "new", adapter(3))
        room[0] = True
        registry.register("default", "new", adapter(3))
        assert sum(p.stat().st_size for p in reserves()) == disk.RESERVE_BYTES


def test_a_reserve_that_was_cut_off_is_made_whole(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path, 400)
    reserve.take()
    files = sorted(tmp_path.iterdir())
    os.truncate(files[1], 3)
    files[2].unlink()
    reserve.take()
    assert [p.stat().st_size for p in sorted(tmp_path.iterdir())] == [100] * 4


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [
        (errno.ENOSPC, "RESOURCE_EXHAUSTED", "DISK_FULL"),
        (errno.EDQUOT, "RESOURCE_EXHAUSTED", "DISK_FULL"),
        (errno.EFBIG, "RESOURCE_EXHAUSTED", "DISK_FULL"),
        (errno.EROFS, "FAILED_PRECONDITION", "DISK_FAILED"),
        (errno.EIO, "FAILED_PRECONDITION", "DISK_FAILED"),
    ],
)
def test_what_a_disk_refuses_is_typed_and_names_no_path(
    number: int, code: str, reason: str
) -> None:
    error = disk_error(OSError(number, os.strerror(number), "/secret/state"))
    assert (error.code, error.reason, error.field) == (code, reason, "server.state")
    assert "secret" not in error.message
