"""The log: one owner a number, and readers that a compaction overtakes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mora_serve.adapters.changelog import ChangeLog
from mora_serve.adapters.quarantine import Quarantine


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("log", "snapshots", "tmp"):
        (tmp_path / name).mkdir()
    return tmp_path


def changelog(directory: Path) -> ChangeLog:
    return ChangeLog(directory, directory / "tmp", Quarantine(directory / "quarantine"))


def test_a_number_is_given_once(directory: Path) -> None:
    log = changelog(directory)
    assert log.append(1, "a")
    assert not changelog(directory).append(1, "b")
    assert log.append(2, "c")
    assert log.read(0) == (0, None, [(1, "a"), (2, "c")])
    assert log.read(1) == (1, None, [(2, "c")])


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
        assert log.read(0) == (0, None, [(1, change)])
    log.snapshot(1, state)
    if state is not None:
        assert log.read(0) == (1, state, [])


def test_a_number_that_a_snapshot_covers_is_taken(directory: Path) -> None:
    """Though a file need not have it any more: its change is part of the snapshot."""
    log = changelog(directory)
    for number in range(1, 5):
        log.append(number, number)
    log.snapshot(2, [1, 2])
    log.snapshot(3, [1, 2, 3])
    for number in range(1, 5):
        assert not log.append(number, "late")
    assert log.read(0) == log.read(2) == (3, [1, 2, 3], [(4, 4)])
    assert log.read(3) == (3, None, [(4, 4)])
    assert log.since_snapshot(4) == 1


def test_who_counts_by_an_old_snapshot_takes_no_other(directory: Path) -> None:
    """It would free the numbers that readers are still at."""
    log = changelog(directory)
    for number in range(1, 5):
        log.append(number, number)
    log.snapshot(3, [1, 2, 3])
    log.snapshot(4, [1, 2, 3, 4], least=2)
    assert log.read(0) == (3, [1, 2, 3], [(4, 4)])
    log.snapshot(4, [1, 2, 3, 4], least=1)
    assert log.read(0) == (4, [1, 2, 3, 4], [])


@pytest.mark.parametrize("late", [4, 3])
def test_a_snapshot_that_comes_late_takes_none_away(directory: Path, late: int) -> None:
    """Two processes that make one at the same change, or one that made its own meanwhile."""
    log = changelog(directory)
    for number in range(1, 6):
        log.append(number, number)
        if number in (2, 4):
            log.snapshot(number, list(range(1, number + 1)))
    before = {d: sorted(os.listdir(directory / d)) for d in ("log", "snapshots")}
    changelog(directory).snapshot(late, list(range(1, late + 1)))
    assert {d: sorted(os.listdir(directory / d)) for d in before} == before
    file = change_file(directory, 4, "snapshots")
    file.write_bytes(damaged(file.read_bytes(), "torn"))
    assert changelog(directory).read(0) == (2, [1, 2], [(3, 3), (4, 4), (5, 5)])


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
                other.snapshot(4, [1, 2, 3, 4])
            return super()._load(directory, number)

    overtaken = Overtaken(directory, directory / "tmp", Quarantine(directory / "quarantine"))
    assert overtaken.read(0) == (4, [1, 2, 3, 4], [])
    assert not overtaken.lost


def test_nothing_temporary_is_left(directory: Path) -> None:
    log = changelog(directory)
    log.append(1, "a")
    log.append(1, "b")
    with pytest.raises(TypeError):
        log.append(2, object())
    log.snapshot(1, {})
    assert not list((directory / "tmp").iterdir())


def change_file(directory: Path, number: int, kind: str = "log") -> Path:
    return directory / kind / f"{number:020d}.json"


def damaged(data: bytes, how: str) -> bytes:
    """A file as a torn write, a lost block or a flipped bit leave it."""
    middle = len(data) // 2
    return {
        "empty": b"",
        "torn": data[:middle],
        "zeros": bytes(len(data)),
        "flipped": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "flipped name": data.replace(b"sha256", b"sha257"),
        "flipped format": data.replace(b'"format": 1', b'"format": 3'),
        "null": b'{"format": 1, "content": null}',
        "list": b"[]",
        "nested": b"[" * 100_000,
    }[how]


HOW = ["empty", "torn", "zeros", "flipped", "flipped name", "flipped format", "null",
       "list", "nested"]  # fmt: skip


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_change_is_set_aside_and_the_others_are_read(
    directory: Path, how: str, number: int
) -> None:
    """The file is kept as it was found, and its number is not given again."""
    log = changelog(directory)
    for i in range(1, 4):
        log.append(i, {"n": i})
    file = change_file(directory, number)
    found = b"\n".join(damaged(copy, how) for copy in file.read_bytes().split(b"\n"))
    file.write_bytes(found)
    for again in range(2):
        reader = changelog(directory)
        changes = dict(reader.read(0).changes)
        assert changes.pop(number)["lost"]
        assert changes == {i: {"n": i} for i in range(1, 4) if i != number}
        assert reader.lost, again
    (kept,) = (directory / "quarantine").iterdir()
    assert kept.read_bytes() == found
    assert not reader.append(number, "late")
    assert reader.append(4, {"n": 4})


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("how", [*HOW, "torn off"])
def test_a_change_that_is_damaged_in_one_block_is_read_from_its_copy(
    directory: Path, how: str, copy: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is lost or set aside then, only told of."""
    changelog(directory).append(1, {"remove": ["default", "a"]})
    file = change_file(directory, 1)
    blocks = [file.read_bytes()[:4096], file.read_bytes()[4096:]]
    if how == "torn off":
        blocks = blocks[:1]
    else:
        blocks[copy] = damaged(blocks[copy].strip(), how).ljust(4096 if copy == 0 else 0)
        if how not in ("zeros", "torn"):
            blocks[copy] = b"\n" + blocks[copy] + b"\n"
    file.write_bytes(b"".join(blocks))
    log = changelog(directory)
    assert log.read(0).changes == [(1, {"remove": ["default", "a"]})]
    assert not log.lost
    assert not (directory / "quarantine").exists()
    assert ("damaged in part" in caplog.text) == (copy == 0 and how not in ("torn off", "empty"))


def test_a_change_that_is_gone_hides_none_behind_it(directory: Path) -> None:
    log = changelog(directory)
    for number in range(1, 6):
        log.append(number, number)
    for number in (2, 3):
        change_file(directory, number).unlink()
    reader = changelog(directory)
    assert reader.read(0) == (0, None, [(1, 1), (4, 4), (5, 5)])
    assert reader.lost
    assert reader.append(6, 6)
    assert changelog(directory).read(0).changes[-1] == (6, 6)


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_snapshot_is_set_aside_for_the_one_before(directory: Path, how: str) -> None:
    log = changelog(directory)
    for number in range(1, 8):
        log.append(number, number)
        if number in (2, 4, 6):
            log.snapshot(number, list(range(1, number + 1)))
    file = change_file(directory, 6, "snapshots")
    file.write_bytes(damaged(file.read_bytes(), how))
    reader = changelog(directory)
    assert reader.read(0) == (4, [1, 2, 3, 4], [(5, 5), (6, 6), (7, 7)])
    assert not reader.lost
    assert len(list((directory / "quarantine").iterdir())) == 1


def test_what_cannot_be_set_aside_is_passed_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Now, after the next change, and by the next process."""
    log = changelog(directory)
    for number in range(1, 5):
        log.append(number, number)
        if number == 2:
            log.snapshot(2, [1, 2])
    for file in (change_file(directory, 4), change_file(directory, 2, "snapshots")):
        file.write_bytes(b"")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    reader = changelog(directory)
    with monkeypatch.context() as m:
        m.setattr(os, "rename", full)
        lost = {"remove": [], "lost": True}
        assert reader.read(0).changes == [(1, 1), (2, 2), (3, 3), (4, lost)]
        assert changelog(directory).read(0).changes == [(1, 1), (2, 2), (3, 3), (4, lost)]
    assert reader.append(5, 5)
    assert reader.read(0).changes[-1] == (5, 5)
    assert changelog(directory).read(0).changes[-2:] == [(4, lost), (5, 5)]
    assert len(list((directory / "quarantine").iterdir())) == 2


def test_a_file_that_is_nobodys_changes_nothing(directory: Path) -> None:
    log = changelog(directory)
    log.append(1, 1)
    for kind in ("log", "snapshots"):
        for name in (".nfs0001", "notes.txt", "7.json", "9" * 20 + ".json"):
            (directory / kind / name).write_text("x")
    assert changelog(directory).read(0) == (0, None, [(1, 1)])
    log.snapshot(1, [1])
    assert changelog(directory).read(0) == (1, [1], [])


def test_a_directory_in_the_place_of_a_change_is_set_aside(directory: Path) -> None:
    log = changelog(directory)
    change_file(directory, 1).mkdir()
    assert log.read(0).changes[0][1]["lost"]
    assert change_file(directory, 1).is_file()


def test_a_name_that_was_not_made_durable_is_taken_back(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller hears of an error, so the change must not be there afterwards."""
    log = changelog(directory)

    def fails(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mora_serve.adapters.changelog.sync_directory", fails)
    with pytest.raises(OSError, match="No space"):
        log.append(1, 1)
    assert log.read(0) == (0, None, [])
    assert not list((directory / "tmp").iterdir())
