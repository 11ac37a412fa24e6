"""The log: one owner a number, and readers that a compaction overtakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mora_serve.adapters.changelog import ChangeLog


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("log", "snapshots", "tmp"):
        (tmp_path / name).mkdir()
    return tmp_path


def changelog(directory: Path) -> ChangeLog:
    return ChangeLog(directory, directory / "tmp")


def test_a_number_is_given_once(directory: Path) -> None:
    log = changelog(directory)
    assert log.append(1, "a")
    assert not changelog(directory).append(1, "b")
    assert log.append(2, "c")
    assert log.read(0) == (2, None, ["a", "c"])
    assert log.read(1) == (2, None, ["c"])


def test_a_number_that_a_snapshot_covers_is_taken(directory: Path) -> None:
    """Though no file has it any more: its change is part of the snapshot."""
    log = changelog(directory)
    for number in range(1, 5):
        log.append(number, number)
    log.snapshot(3, [1, 2, 3])
    for number in range(1, 5):
        assert not log.append(number, "late")
    assert log.read(0) == log.read(2) == (4, [1, 2, 3], [4])
    assert log.read(3) == (4, None, [4])
    assert log.since_snapshot(4) == 1


def test_a_reader_that_a_compaction_overtakes_starts_again(directory: Path) -> None:
    """What looks like the log's end may be a hole that a compaction has made."""
    other = changelog(directory)
    for number in range(1, 4):
        other.append(number, number)

    class Overtaken(ChangeLog):
        def _load(self, directory: Path, number: int) -> Any | None:
            if number == 2 and other.since_snapshot(3) == 3:
                other.snapshot(3, [1, 2, 3])
                other.append(4, 4)
            return super()._load(directory, number)

    assert Overtaken(directory, directory / "tmp").read(0) == (4, [1, 2, 3], [4])


def test_nothing_temporary_is_left(directory: Path) -> None:
    log = changelog(directory)
    log.append(1, "a")
    log.append(1, "b")
    with pytest.raises(TypeError):
        log.append(2, object())
    log.snapshot(1, {})
    assert not list((directory / "tmp").iterdir())
