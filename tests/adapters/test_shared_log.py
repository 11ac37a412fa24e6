"""The log in a store of objects: one owner a number, without a lock."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.adapters.change_file import packed
from mora_serve.adapters.changelog import LOST
from mora_serve.adapters.objects import Objects
from mora_serve.adapters.shared_log import SharedLog
from mora_serve.errors import ConfigError, Unavailable
from tests.adapters.stores import memory_objects


def change(number: int) -> dict[str, Any]:
    return {"n": number}


def said(changes: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Changes without their writers' marks."""
    return [(n, {k: v for k, v in c.items() if k != "by"}) for n, c in changes]


def filled(count: int, snapshots: tuple[int, ...] = ()) -> tuple[Objects, SharedLog]:
    objects = memory_objects()
    log = SharedLog(objects)
    for number in range(1, count + 1):
        assert log.append(number, change(number))
        if number in snapshots:
            log.snapshot(number, list(range(1, number + 1)))
    return objects, log


def numbers(objects: Objects, folder: str) -> list[int]:
    return sorted(int(n[:20]) for n in objects.sizes(folder))


def name(number: int, folder: str = "log") -> str:
    return f"{folder}/{number:020d}.json"


def test_a_number_is_given_once_even_for_the_same_change() -> None:
    objects, log = filled(1)
    assert not SharedLog(objects).append(1, change(1))
    assert log.append(2, change(2))
    news = log.read(0)
    assert (news.start, news.snapshot, said(news.changes)) == (
        0,
        None,
        [(1, {"n": 1}), (2, {"n": 2})],
    )


@given(st.integers(1, 30), st.sets(st.integers(1, 30), max_size=4), st.integers(0, 30))
def test_a_reader_at_any_change_gets_all_behind_it(count: int, at: set[int], after: int) -> None:
    """From a snapshot, or change by change; and knows whether there is anything."""
    _, log = filled(count, tuple(sorted(at)))
    reader = SharedLog(log._objects)
    after = min(after, count)
    news = reader.read(after)
    covered = [] if news.snapshot is None else news.snapshot[after:]
    assert covered + [n for n, _ in news.changes] == list(range(after + 1, count + 1))
    assert all(c["n"] == n for n, c in news.changes)
    assert not reader.lost
    if (name(after + 1)[4:] in log._objects.sizes("log")) or after == count:
        assert reader.newer(after) == (count > after)


def test_a_late_writer_does_not_get_a_number_that_a_snapshot_freed() -> None:
    objects, _ = filled(9, snapshots=(3, 6, 9))
    assert objects.read(name(2)) is None
    late = SharedLog(objects)
    assert not late.append(2, {"n": "late"})
    assert objects.read(name(2)) is None


def test_a_writer_whom_snapshots_overtake_in_the_act_is_not_told_that_it_succeeded() -> None:
    """Its file may stand where nobody reads it."""
    objects, other = filled(1)

    class Slow(SharedLog):
        def _newest_snapshot(self) -> int:
            found = super()._newest_snapshot()
            if not objects.sizes("snapshots"):
                for number in range(2, 10):
                    other.append(number, change(number))
                    if number % 3 == 0:
                        other.snapshot(number, list(range(1, number + 1)))
            return found

    with pytest.raises(Unavailable, match="may or may not"):
        Slow(objects).append(2, {"n": "late"})
    news = SharedLog(objects).read(1)
    assert news.snapshot[1:] + [n for n, _ in news.changes] == list(range(2, 10))


def test_a_reader_whom_snapshots_overtake_in_the_act_takes_no_late_writer_s_file_for_a_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects, other = filled(1)
    read_all = objects.read_all

    def slow(names: Iterable[str]) -> dict[str, bytes]:
        if not objects.sizes("snapshots"):
            for number in range(2, 10):
                other.append(number, change(number))
                if number % 3 == 0:
                    other.snapshot(number, list(range(1, number + 1)))
            assert objects.create(name(1), packed({"n": "late"}))
        return read_all(names)

    monkeypatch.setattr(objects, "read_all", slow)
    news = SharedLog(objects).read(0)
    assert (news.snapshot, news.changes) == (list(range(1, 10)), [])


def test_a_snapshot_leaves_the_one_before_and_the_changes_since() -> None:
    objects, log = filled(8, snapshots=(2, 4, 6))
    assert numbers(objects, "log") == [5, 6, 7, 8]
    assert numbers(objects, "snapshots") == [4, 6]
    before = objects.sizes("log")
    SharedLog(objects).snapshot(5, [])
    assert objects.sizes("log") == before
    assert log.since_snapshot(8) == 2


def test_who_counts_by_an_old_snapshot_takes_no_other_and_frees_no_numbers() -> None:
    objects, log = filled(8, snapshots=(6,))
    log.snapshot(8, [], least=3)
    assert numbers(objects, "snapshots") == [6]
    log.snapshot(8, [], least=2)
    assert numbers(objects, "snapshots") == [6, 8]


def test_a_reader_whose_next_change_is_gone_hears_of_the_others_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects, log = filled(7)
    reader = SharedLog(objects)
    assert reader.read(0).changes[-1][0] == 7
    for number in (8, 9):
        log.append(number, change(number))
        log.snapshot(number, [])
    assert numbers(objects, "log") == [9]
    later = time.monotonic() + 3.0
    assert not reader.newer(7)  # it looked just now
    monkeypatch.setattr("time.monotonic", lambda: later)
    assert reader.newer(7)
    assert not reader.newer(9)


def test_a_damaged_change_is_passed_over_by_all_readers_alike() -> None:
    objects, _ = filled(7)
    objects._fs.pipe_file(objects._path(name(2)), b"{torn")
    for after in (0, 1):
        reader = SharedLog(objects)
        changes = reader.read(after).changes
        assert dict(changes)[2] == LOST
        assert [n for n, _ in changes] == list(range(after + 1, 8))
        assert reader.lost
    assert not SharedLog(objects).append(2, {"n": "late"})


def test_a_damaged_snapshot_gives_way_to_the_one_before() -> None:
    objects, _ = filled(7, snapshots=(2, 4, 6))
    objects._fs.pipe_file(objects._path(name(6, "snapshots")), b"")
    news = SharedLog(objects).read(0)
    assert (news.start, news.snapshot, [n for n, _ in news.changes]) == (4, [1, 2, 3, 4], [5, 6, 7])


def test_a_change_that_is_gone_hides_none_behind_it() -> None:
    objects, _ = filled(5)
    objects.remove(name(2))
    reader = SharedLog(objects)
    assert [n for n, _ in reader.read(0).changes] == [1, 3, 4, 5]
    assert reader.lost


def test_what_another_version_wrote_is_an_error() -> None:
    objects, log = filled(1)
    with pytest.raises(ConfigError, match="this version does not know"):
        log.reject(1)
    data = (objects.read(name(1)) or b"").replace(b'"format": 1', b'"format": 3')
    objects._fs.pipe_file(objects._path(name(1)), data)
    assert SharedLog(objects).read(0).changes == [(1, LOST)]
