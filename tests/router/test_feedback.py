"""Feedback on the disk: bounded, whole after a kill at any moment, read on from any cursor."""

from __future__ import annotations

import dataclasses
import fcntl
import multiprocessing
import os
import random
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mora_serve.config import LEAST_FEEDBACK_BYTES
from mora_serve.errors import ConfigError, InvalidArgument
from mora_serve.router.feedback import (
    FILES,
    MAX_ROW_BYTES,
    FeedbackRow,
    FeedbackStore,
    Position,
)

TENANT = "acme"
BEGINNING = Position()
forks = multiprocessing.get_context("fork")


def row(number: int, tenant: str = TENANT, text: str = "reverse it") -> FeedbackRow:
    return FeedbackRow(
        tenant=tenant,
        prompt=f"{text} {number}",
        tasks=("reverse",),
        adapters=("rev-2",),
        routed=("rev-1", "json"),
        router_digest="ab" * 32,
        base_fingerprint="base-1",
        time=float(number),
    )


def rows_of(
    store: FeedbackStore, tenant: str = TENANT, start: Position = BEGINNING, **options: float
) -> list[FeedbackRow]:
    """All rows that follow ``start``."""
    return everything(store, tenant, start, **options)[0]


def everything(
    store: FeedbackStore, tenant: str = TENANT, start: Position = BEGINNING, **options: float
) -> tuple[list[FeedbackRow], Position]:
    """All rows that follow ``start``, and where they end."""
    found: list[FeedbackRow] = []
    while True:
        page = store.read(start, tenant, **options)
        found += page.rows
        start = page.end
        if page.last:
            return found, start


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl"))


def used(directory: Path) -> int:
    return sum(file.stat().st_size for file in files(directory))


@pytest.fixture
def store(tmp_path: Path) -> FeedbackStore:
    return FeedbackStore(tmp_path / "feedback", LEAST_FEEDBACK_BYTES)


names = st.lists(st.text(max_size=5), max_size=3).map(tuple)
any_row = st.builds(
    FeedbackRow,
    tenant=st.sampled_from(("a", "b")),
    prompt=st.text(max_size=40),
    tasks=names,
    adapters=names,
    routed=names,
    router_digest=st.text("0f", max_size=4),
    base_fingerprint=st.text("0f", max_size=4),
    time=st.floats(0, 1e10),
)


@given(any_row)
def test_a_row_is_one_line_and_comes_back_from_it(given_row: FeedbackRow) -> None:
    """Whatever characters it holds."""
    line = given_row.to_line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert FeedbackRow.from_line(line) == given_row


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batches=st.lists(st.lists(any_row, max_size=4), max_size=5))
def test_each_tenant_reads_its_own_rows_in_order(tmp_path_factory, batches) -> None:
    store = FeedbackStore(tmp_path_factory.mktemp("feedback"), LEAST_FEEDBACK_BYTES)
    for batch in batches:
        assert store.append(batch) == len(batch)
    for tenant in ("a", "b"):
        assert rows_of(store, tenant) == [r for b in batches for r in b if r.tenant == tenant]


def test_a_cursor_gives_what_came_after_it(store: FeedbackStore) -> None:
    """Also where the rows before it were another tenant's."""
    store.append([row(1), row(2), row(3, "other")])
    found, end = everything(store)
    assert found == [row(1), row(2)]
    again = Position.of(end.cursor())
    assert again == end
    assert everything(store, start=again) == ([], end)
    store.append([row(4)])
    assert rows_of(store, start=again) == [row(4)]


def test_rows_before_a_time_are_left_out(store: FeedbackStore) -> None:
    store.append([row(i) for i in range(10)])
    assert rows_of(store, since=7.0) == [row(7), row(8), row(9)]


@pytest.mark.parametrize(
    "cursor", ["x", "1", "1.", ".1", "1.2.3", "-1.2", "A.0", "1.2\n", f"{'f' * 13}.0"]
)
def test_what_is_no_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidArgument, match="give the one of an earlier answer") as caught:
        Position.of(cursor)
    assert caught.value.field == "cursor"


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**48 - 1))
def test_a_cursor_is_its_position(file: int, offset: int) -> None:
    assert Position.of(Position(file, offset).cursor()) == (file, offset)


def test_any_position_can_be_read_from(store: FeedbackStore) -> None:
    """A cursor that a caller has made up gives whole rows or none."""
    store.append([row(i) for i in range(3)])
    (file,) = files(store._directory)
    number, size = int(file.stem), file.stat().st_size
    for offset in (*range(size + 2), 2**48 - 1):
        for start in (Position(number, offset), Position(number + 1, offset)):
            assert [r for r in rows_of(store, start=start) if r not in map(row, range(3))] == []
    assert rows_of(store, start=Position(number - 1, 5)) == [row(0), row(1), row(2)]


def test_the_oldest_rows_make_room(store: FeedbackStore) -> None:
    """The directory never exceeds its size, keeps at least most of it, and cursors go on."""
    text = "x" * 1000
    count = 3 * LEAST_FEEDBACK_BYTES // 1000
    early = BEGINNING
    for i in range(0, count, 20):
        store.append([row(j, text=text) for j in range(i, i + 20)])
        assert used(store._directory) <= LEAST_FEEDBACK_BYTES
        if not i:
            early = everything(store)[1]
    kept = rows_of(store)
    assert [r.time for r in kept] == list(range(int(kept[0].time), i + 20))
    assert used(store._directory) > LEAST_FEEDBACK_BYTES * (FILES - 2) / FILES
    assert rows_of(store, start=early) == kept


def test_a_smaller_size_holds_from_the_next_row_on(tmp_path: Path) -> None:
    large = FeedbackStore(tmp_path, 4 * LEAST_FEEDBACK_BYTES)
    for i in range(60):
        large.append([row(i, text="x" * 60_000)])
    assert used(tmp_path) > LEAST_FEEDBACK_BYTES
    FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES).append([row(99)])
    assert used(tmp_path) <= LEAST_FEEDBACK_BYTES
    assert rows_of(large)[-1] == row(99)


def test_a_row_that_is_too_long_is_left_out(store: FeedbackStore) -> None:
    assert store.append([row(1), row(2, text="x" * MAX_ROW_BYTES), row(3)]) == 2
    assert rows_of(store) == [row(1), row(3)]


def test_a_batch_may_fill_several_files(store: FeedbackStore) -> None:
    batch = [row(i, text="x" * 50_000) for i in range(10)]
    assert store.append(batch) == 10
    assert len(files(store._directory)) > 1
    assert rows_of(store) == batch


class TestInterrupted:
    """What a killed process or a failed disk leaves behind."""

    def test_a_file_cut_anywhere_loses_only_what_was_cut(self, tmp_path: Path) -> None:
        """Rows before the cut are read, and so are rows that are written after it."""
        FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES).append([row(0), row(1, text="日本")])
        (file,) = files(tmp_path)
        whole = file.read_bytes()
        first = whole.index(b"\n") + 1
        for cut in {*range(0, len(whole), 9), first - 1, first, len(whole) - 2, len(whole) - 1}:
            file.write_bytes(whole[:cut])
            store = FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES)
            before = [row(0)] if cut >= first else []
            assert rows_of(store) == before
            store.append([row(2)])
            lost = [row(1, text="日本")] if cut == len(whole) - 1 else []  # but for its newline
            whole_first = [row(0)] if cut == first - 1 else before
            assert rows_of(store) == [*whole_first, *lost, row(2)]

    def test_blocks_that_never_reached_the_disk_are_passed_over(self, store) -> None:
        """Some file systems leave zeros where a file grew before the power went."""
        store.append([row(0)])
        (file,) = files(store._directory)
        with file.open("ab") as f:
            f.write(bytes(300_000))
        assert rows_of(store) == [row(0)]
        store.append([row(1)])
        assert rows_of(store) == [row(0), row(1)]

    def test_rows_of_another_version_are_passed_over(self, store: FeedbackStore) -> None:
        store.append([row(0)])
        (file,) = files(store._directory)
        other = dataclasses.asdict(row(1)) | {"new": 1}
        with file.open("a") as f:
            f.write(f"{other}\n[]\n5\n\n{{}}\n".replace("'", '"'))
        store.append([row(2)])
        assert rows_of(store) == [row(0), row(2)]

    def test_a_killed_process_loses_only_what_it_was_writing(self, tmp_path: Path) -> None:
        """SIGKILL at random moments: all that was acknowledged is there, in order."""
        rng = random.Random(0)
        start, acknowledged, begun = BEGINNING, 0, 0
        for _ in range(12):
            reading, writing = os.pipe()
            process = forks.Process(target=_append_until_killed, args=(tmp_path, begun, writing))
            process.start()
            os.close(writing)
            time.sleep(rng.uniform(0.03, 0.12))
            os.kill(process.pid, signal.SIGKILL)
            with open(reading, "rb") as pipe:
                acknowledged = max(acknowledged, begun + len(pipe.read()))
            process.join()
            store = FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES)
            assert store.append([row(-1)]) == 1
            found, start = everything(store, start=start)
            numbers = [int(r.time) for r in found]
            assert numbers[-1] == -1
            assert numbers[:-1] == list(range(begun, begun + len(numbers) - 1))
            begun += len(numbers) - 1
            assert begun >= acknowledged
        assert begun > 20

    def test_what_the_disk_refuses_leaves_whole_rows(self, tmp_path: Path) -> None:
        """A write that fails in the middle of a row is taken back; later ones go on."""
        store = FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES)
        store.append([row(0)])
        (file,) = files(tmp_path)
        size = file.stat().st_size
        process = forks.Process(target=_append_on_a_full_disk, args=(tmp_path, size + 100))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert file.stat().st_size == size
        store.append([row(2)])
        assert rows_of(store) == [row(0), row(2)]

    def test_processes_append_side_by_side(self, tmp_path: Path) -> None:
        """No row is lost or torn, and one cursor follows all of them."""
        processes = [forks.Process(target=_append_some, args=(tmp_path, n)) for n in range(3)]
        for process in processes:
            process.start()
        store = FeedbackStore(tmp_path, LEAST_FEEDBACK_BYTES)
        start, found = BEGINNING, []
        while any(p.is_alive() for p in processes) or not start.file:
            rows, start = everything(store, start=start)
            found += rows
        found += rows_of(store, start=start)
        assert [p.exitcode for p in processes] == [0, 0, 0]
        for n in range(3):
            own = [r.time for r in found if r.tasks == (str(n),)]
            assert own == list(range(40))

    def test_an_append_waits_for_that_of_another_process(self, store: FeedbackStore) -> None:
        """Otherwise it might write to a file that readers have left behind."""
        descriptor = os.open(store._directory, os.O_RDONLY | os.O_DIRECTORY)
        with ThreadPoolExecutor(1) as threads:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                appended = threads.submit(store.append, [row(1)])
                with pytest.raises(TimeoutError):
                    appended.result(0.2)
                assert rows_of(store) == []
            finally:
                os.close(descriptor)
            assert appended.result(20) == 1
        assert rows_of(store) == [row(1)]


def _append_until_killed(directory: Path, first: int, pipe: int) -> None:
    store = FeedbackStore(directory, LEAST_FEEDBACK_BYTES)
    while True:
        store.append([row(first)])
        os.write(pipe, b".")
        first += 1


def _append_on_a_full_disk(directory: Path, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        FeedbackStore(directory, LEAST_FEEDBACK_BYTES).append([row(1)])
    except OSError:
        return
    os._exit(1)


def _append_some(directory: Path, number: int) -> None:
    store = FeedbackStore(directory, LEAST_FEEDBACK_BYTES)
    for i in range(40):
        labelled = dataclasses.replace(row(i), tasks=(str(number),), prompt="x" * 5000)
        store.append([labelled])


def test_without_a_directory_rows_live_as_long_as_the_store() -> None:
    store = FeedbackStore(None, LEAST_FEEDBACK_BYTES)
    directory = store._directory
    store.append([row(1)])
    assert rows_of(store) == [row(1)]
    store.close()
    assert not directory.exists()


def test_only_the_servers_user_may_read_them(store: FeedbackStore) -> None:
    store.append([row(1)])
    (file,) = files(store._directory)
    assert file.stat().st_mode & 0o077 == 0
    assert store._directory.stat().st_mode & 0o077 == 0


def test_a_directory_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"router\.feedback = false") as caught:
        FeedbackStore(tmp_path / "file/feedback", LEAST_FEEDBACK_BYTES)
    assert str(tmp_path) not in caught.value.message
