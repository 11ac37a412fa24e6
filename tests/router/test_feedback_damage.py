"""Damaged files of feedback: set aside at the start, and the rest is read from where it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mora_serve.config import LEAST_FEEDBACK_BYTES
from mora_serve.router.feedback import FeedbackRow, FeedbackStore, Position


def row(number: int) -> FeedbackRow:
    return FeedbackRow("default", f"prompt {number}", ("t",), (), (), "", "", float(number))


def opened(directory: Path) -> FeedbackStore:
    return FeedbackStore(directory, LEAST_FEEDBACK_BYTES)


def numbers(store: FeedbackStore, start: Position = Position()) -> list[int]:  # noqa: B008
    found, last = [], False
    while not last:
        page = store.read(start, "default")
        found += [int(r.time) for r in page.rows]
        start, last = page.end, page.last
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    store = opened(tmp_path / "feedback")
    for number in range(5):
        store.append([row(number)])
    return tmp_path / "feedback"


def file_of(directory: Path) -> Path:
    (file,) = directory.glob("*.jsonl")
    return file


def test_a_damaged_row_is_set_aside_and_positions_stay(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(directory)
    file = file_of(directory)
    lines = file.read_bytes().splitlines(keepends=True)
    behind = store.read(Position(), "default").end
    found = lines[2][:20] + b"\x00\xff" + lines[2][22:]
    file.write_bytes(b"".join([*lines[:2], found, *lines[3:]]))
    store = opened(directory)
    assert numbers(store) == [0, 1, 3, 4]
    store.append([row(5)])
    assert numbers(store, behind) == [5]
    (kept,) = (directory / "quarantine").iterdir()
    assert kept.read_bytes() == found.rstrip(b"\n")
    assert kept.stat().st_mode & 0o077 == 0
    assert "1 damaged row(s)" in caplog.text
    caplog.clear()
    opened(directory)
    assert not caplog.text


def test_an_unfinished_row_is_set_aside(directory: Path) -> None:
    file = file_of(directory)
    file.write_bytes(file.read_bytes()[:-10])
    store = opened(directory)
    store.append([row(9)])
    assert numbers(store) == [0, 1, 2, 3, 9]
    assert len(list((directory / "quarantine").iterdir())) == 1


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_is_no_file_is_set_aside(directory: Path, kind: str) -> None:
    name = f"{1:020d}.jsonl"
    if kind == "directory":
        (directory / name).mkdir()
    else:
        (directory / name).symlink_to("/etc/passwd")
    store = opened(directory)
    assert numbers(store) == [0, 1, 2, 3, 4]
    assert not (directory / name).exists()


def test_what_cannot_be_set_aside_is_passed_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: rows and a whole file that are of no use, before and after a start."""
    file = file_of(directory)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b"{half\n", *lines[2:]]))
    later = f"{int(file.stem) + 1:020d}.jsonl"
    (directory / later).mkdir()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("rename", "mkdir"):
        monkeypatch.setattr(os, name, full)
    for _ in range(2):
        store = opened(directory)
        assert numbers(store) == [0, 1, 2, 3, 4]
    store.append([row(5)])
    assert numbers(store) == [0, 1, 2, 3, 4, 5]


def test_rows_of_another_version_are_left_where_they_are(directory: Path) -> None:
    file = file_of(directory)
    file.write_bytes(file.read_bytes() + b'{"new": 1}\n[]\n')
    before = file.read_bytes()
    assert numbers(opened(directory)) == [0, 1, 2, 3, 4]
    assert file.read_bytes() == before
    assert not (directory / "quarantine").exists()
