"""The log: one owner a number, and readers that a compaction overtakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=3), part),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=values, state=values)
def test_any_json_comes_back(tmp_path_factory, change: Any, state: Any) -> None:
    """From a change as from a snapshot, whatever is nested in it."""
    directory = tmp_path_factory.mktemp("log")
    for name in ("log", "snapshots", "tmp"):
        (directory / name).mkdir()
    log = changelog(directory)
    log.append(1, change)
    if change is not None:
        assert log.read(0) == (1, None, [change])
    log.snapshot(1, state)
    if state is not None:
        assert log.read(0) == (1, state, [])


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
