"""Registries of one store: each sees what the others did, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shared_registry import together
from mora_serve.adapters.files import WEIGHTS
from mora_serve.adapters.record import Change
from mora_serve.adapters.registry import Registry
from mora_serve.errors import (
    AlreadyExists,
    FailedPrecondition,
    MoraError,
    NotFound,
    Unavailable,
)
from mora_serve.server.poll import Poller
from tests.adapters.make import LIMITS, SHAPE, adapter
from tests.adapters.stores import go_down, memory_url, objects_of, opened, stalled


@pytest.fixture
def pair() -> Iterator[tuple[Registry, Registry]]:
    url = memory_url()
    with opened(url) as ours, opened(url) as theirs:
        yield ours, theirs


def summary(registry: Registry) -> Any:
    records = [(r.tenant, r.name, r.version, r.digest, r.pinned, r.tasks) for r in registry.all()]
    return records, registry.router(), registry.revision


LIMITS_AND_SHAPE = (LIMITS, SHAPE)
NAMES, SEEDS = ["a", "b"], [0, 1, 2]
STEPS = st.one_of(
    st.tuples(st.just("register"), st.sampled_from(NAMES), st.sampled_from(SEEDS), st.booleans()),
    st.tuples(st.just("unregister"), st.sampled_from(NAMES)),
    st.tuples(st.just("pin"), st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just("router"), st.sampled_from(SEEDS)),
    st.tuples(st.just("poll")),
    st.tuples(st.just("collect")),
    st.tuples(st.just("open again")),
)


def apply(registry: Registry, step: tuple[Any, ...]) -> str:
    """Make a change; the code of the error that refuses it."""
    kind, *arguments = step
    try:
        match kind:
            case "register":
                name, seed, replace = arguments
                registry.register("default", name, adapter(seed), replace=replace)
            case "unregister":
                registry.unregister("default", arguments[0])
            case "pin":
                registry.pin("default", *arguments)
            case "router":
                registry.set_router({"r": b"%d" % arguments[0]})
    except MoraError as e:
        return e.code
    return ""


@settings(deadline=None, max_examples=40)
@given(steps=st.lists(st.tuples(st.integers(0, 1), STEPS), max_size=25))
def test_two_registries_of_a_store_do_what_one_directory_does(
    steps: list[tuple[int, tuple[Any, ...]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever either does, and however old what it knows is: a change is made or refused as it is
    in a registry that one process has for itself.
    """
    url = memory_url()
    pair = [opened(url), opened(url)]
    with Registry(tmp_path_factory.mktemp("alone"), *LIMITS_AND_SHAPE) as alone:
        for which, step in steps:
            if step[0] == "poll":
                pair[which].poll()
            elif step[0] == "collect":
                for _ in range(2):  # the first marks
                    pair[which]._storage.collect(
                        lambda r=pair[which]: r._history.newest().digests, age=0.0
                    )
            elif step[0] == "open again":
                pair[which].close()
                pair[which] = opened(url)
            else:
                assert apply(pair[which], step) == apply(alone, step)
        for registry in pair:
            registry.poll()
            assert summary(registry) == summary(alone)
            for record in registry.all():
                assert registry.open(record.digest).digest == record.digest
            registry.close()


def test_a_change_is_seen_and_announced_by_the_other(pair: tuple[Registry, Registry]) -> None:
    ours, theirs = pair
    told: list[Change] = []
    theirs.subscribe(told.append)
    ours.register("default", "a", adapter(1))
    theirs.poll()
    assert theirs.get("default", "a").digest == adapter(1).digest
    assert theirs.open(adapter(1).digest) == adapter(1)
    ours.unregister("default", "a")
    theirs.poll()
    with pytest.raises(NotFound):
        theirs.get("default", "a")
    assert [(c.before is not None, c.after is not None) for c in told] == [
        (False, True),
        (True, False),
    ]


def test_a_name_that_another_took_since_is_taken(pair: tuple[Registry, Registry]) -> None:
    """Though this one has not heard of it when it begins; nor of a removal, or a replacement."""
    ours, theirs = pair
    ours.register("default", "a", adapter(1))
    with pytest.raises(AlreadyExists):
        theirs.register("default", "a", adapter(2))
    record, new = theirs.register("default", "a", adapter(2), replace=True)
    assert (record.version, new) == (2, True)
    assert not ours.register("default", "a", adapter(2))[1]
    theirs.register("default", "b", adapter(1))
    ours.unregister("default", "b")
    theirs.register("default", "b", adapter(2))


def test_a_version_that_a_request_uses_stays_readable_elsewhere(
    pair: tuple[Registry, Registry],
) -> None:
    ours, theirs = pair
    ours.register("default", "a", adapter(1))
    theirs.poll()
    theirs.retain(adapter(1).digest)
    ours.register("default", "a", adapter(2), replace=True)
    theirs.poll()
    assert theirs.open(adapter(1).digest) == adapter(1)
    theirs.release(adapter(1).digest)


def test_a_poller_takes_changes_in_and_outlives_an_outage(
    pair: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    poller = Poller(theirs, 0.02)
    try:
        with monkeypatch.context() as m:
            go_down(theirs, m)
            ours.register("default", "a", adapter(1))
            time.sleep(0.2)
            assert theirs.list("default") == ()
        end = time.monotonic() + 60
        while not theirs.list("default") and time.monotonic() < end:
            time.sleep(0.02)
        assert [r.name for r in theirs.list("default")] == ["a"]
    finally:
        poller.close()
    assert not {"registry-poll", "registry-collect"} & {t.name for t in threading.enumerate()}


def test_a_poller_goes_on_while_another_thread_collects(
    pair: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    monkeypatch.setattr("mora_serve.server.poll.COLLECT_SECONDS", 0.01)
    ours.register("default", "a", adapter(1))
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        begun.set()
        assert go_on.wait(60)
        return 0

    monkeypatch.setattr(theirs, "collect", slow)
    poller = Poller(theirs, 0.02)
    try:
        assert begun.wait(60)
        ours.register("default", "b", adapter(2))
        end = time.monotonic() + 60
        while len(theirs.list("default")) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert [r.name for r in theirs.list("default")] == ["a", "b"]
    finally:
        go_on.set()
        poller.close()


def test_without_the_store_what_is_here_is_served_and_changes_are_unavailable(
    pair: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    ours, theirs = pair
    ours.register("default", "a", adapter(1))
    ours.register("default", "b", adapter(2))
    theirs.poll()
    theirs.open(adapter(1).digest)
    with monkeypatch.context() as m:
        go_down(theirs, m)
        assert [r.name for r in theirs.served("default")] == ["a", "b"]
        theirs.retain(adapter(1).digest)
        assert theirs.open(adapter(1).digest) == adapter(1)
        theirs.release(adapter(1).digest)
        changes = (
            lambda: theirs.register("default", "c", adapter(3)),
            lambda: theirs.unregister("default", "a"),
            lambda: theirs.pin("default", "a", True),
            lambda: theirs.set_router({"r": b"1"}),
            lambda: theirs.open(adapter(2).digest),
            lambda: theirs.poll(),
        )
        for change in changes:
            with pytest.raises(Unavailable) as caught:
                change()
            assert caught.value.reason == "STORE_UNAVAILABLE"
            assert "secret" not in caught.value.message
    objects_of(theirs)._failed = -10.0
    assert "secret" not in caplog.text
    assert theirs.open(adapter(2).digest) == adapter(2)
    theirs.register("default", "c", adapter(3))
    ours.poll()
    assert [r.name for r in ours.served("default")] == ["a", "b", "c"]


def test_a_content_that_the_store_damaged_is_not_served_until_it_is_registered_again(
    pair: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mora_serve.adapters.shared_contents._AGAIN", 0.0)
    ours, theirs = pair
    ours.register("default", "a", adapter(1))
    theirs.poll()
    objects = objects_of(ours)
    objects._fs.pipe_file(objects._path(f"blobs/{adapter(1).digest}/{WEIGHTS}"), b"damaged")
    with pytest.raises(NotFound):
        theirs.open(adapter(1).digest)
    assert theirs.served("default") == ()
    assert ours.open(adapter(1).digest) == adapter(1)  # its own copy is whole
    assert not ours.register("default", "a", adapter(1))[1]
    theirs.get("default", "a")
    assert theirs.open(adapter(1).digest) == adapter(1)
    assert [r.name for r in theirs.served("default")] == ["a"]


def test_a_content_that_is_missing_in_the_store_shows_at_the_start() -> None:
    url = memory_url()
    with opened(url) as ours:
        ours.register("default", "a", adapter(1))
        objects_of(ours)._fs.rm(objects_of(ours)._path("blobs"), recursive=True)
        with opened(url) as theirs:
            assert theirs.served("default") == ()
            with pytest.raises(FailedPrecondition):
                theirs.get("default", "a")


def test_what_a_removal_leaves_is_collected_when_it_is_old_but_not_without_a_history(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody emptied a part of the bucket: what is left may be all there is to repair it with."""
    url = memory_url()
    with opened(url) as ours:
        objects = objects_of(ours)
        for i in (1, 2):
            ours.register("default", f"a{i}", adapter(i))
        ours.unregister("default", "a2")
        now = objects.now()
        monkeypatch.setattr(type(objects), "now", lambda *_: now + 1e9)
        assert ours.collect() == 0
        assert ours.collect() == 1
        assert objects.folders("blobs") == [adapter(1).digest]
        for folder in ("log", "snapshots"):
            objects._fs.rm(objects._path(folder), recursive=True)
        with opened(url) as theirs:
            assert theirs.collect() == 0
        assert objects.folders("blobs") == [adapter(1).digest]


def test_a_slow_store_makes_changes_wait_and_nothing_else(pair: tuple[Registry, Registry]) -> None:
    ours, theirs = pair
    for i, name in enumerate(("a", "b", "c")):
        ours.register("default", name, adapter(i))
    theirs.poll()
    for i in range(2):
        theirs.open(adapter(i).digest)
        theirs.retain(adapter(i).digest)
    ours.unregister("default", "a")
    theirs.poll()
    theirs._offers.withdraw(adapter(1).digest)
    told: list[Change] = []

    def others() -> None:
        theirs.subscribe(told.append)
        theirs.release(adapter(0).digest)  # the last one, of a content that is removed
        theirs.release(adapter(1).digest)
        assert theirs.get("default", "b").digest == adapter(1).digest  # looked at again
        assert theirs.open(adapter(1).digest) == adapter(1)

    ours.register("default", "d", adapter(3))
    with stalled(theirs, "cat_file") as store, ThreadPoolExecutor() as threads:
        try:
            slow = [threads.submit(f) for f in (theirs.refresh, lambda: pin(theirs, "c"))]
            store.wait_for(2)
            threads.submit(others).result(30)
            assert [c.after for c in told] == [theirs.get("default", "b")]
            assert not any(future.done() for future in slow)
        finally:
            store.go_on.set()
        for future in slow:
            future.result(60)
    assert theirs.get("default", "c").pinned
    assert [r.name for r in theirs.list("default")] == ["b", "c", "d"]


def pin(registry: Registry, name: str) -> None:
    registry.pin("default", name, True)


def test_threads_that_change_and_poll_at_once_announce_each_change_once_and_in_order() -> None:
    """Whoever comes first with a state that another thread reads from the store as well."""
    url = memory_url()
    ours, theirs = (opened(url, every=1000) for _ in range(2))
    told: list[Change] = []
    theirs.subscribe(told.append)

    def change(registry: Registry, name: str) -> None:
        for i in range(12):
            registry.register("default", f"{name}{i}", adapter(i))
            registry.unregister("default", f"{name}{i}")

    with ThreadPoolExecutor() as threads:
        work = [
            threads.submit(change, *pair) for pair in ((ours, "a"), (theirs, "b"), (theirs, "c"))
        ]
        while not all(future.done() for future in work):
            theirs.poll()
        for future in work:
            future.result(60)
    theirs.poll()
    assert [c.revision for c in told] == list(range(1, 3 * 2 * 12 + 1))
    assert theirs.list("default") == ()
    for registry in (ours, theirs):
        registry.close()


def test_a_change_that_the_poller_reads_before_its_writer_goes_on_is_announced_once(
    pair: tuple[Registry, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = pair
    told: list[Change] = []
    ours.subscribe(told.append)
    append = ours._log.append

    def read_at_once(number: int, change: Any) -> bool:
        made = append(number, change)
        ours.refresh()
        return made

    monkeypatch.setattr(ours._log, "append", read_at_once)
    record, new = ours.register("default", "a", adapter(1))
    assert [c.after for c in told] == [record]
    assert new


def test_a_content_that_is_gone_from_the_store_is_written_again_by_who_has_it(
    pair: tuple[Registry, Registry],
) -> None:
    """A slow collector may remove what has just been registered, or a rule of the bucket."""
    ours, theirs = pair
    ours.register("default", "a", adapter(1))
    theirs.poll()
    objects = objects_of(ours)
    objects._fs.rm(objects._path("blobs"), recursive=True)
    assert theirs.collect() == 0
    with pytest.raises(NotFound):
        theirs.open(adapter(1).digest)
    assert ours.collect() == 0
    theirs._contents._bad.clear()
    theirs.get("default", "a")
    assert theirs.open(adapter(1).digest) == adapter(1)


def test_a_directory_can_be_moved_into_a_store_and_back(tmp_path: Path) -> None:
    """The files are the same: copying them is all there is to do."""
    with Registry(tmp_path / "state", *LIMITS_AND_SHAPE, snapshot_every=3) as alone:
        for i in range(5):
            alone.register("default", f"a{i}", adapter(i), tasks=["t"])
        alone.set_router({"r": b"1"})
        before = summary(alone)
    with opened(f"file://{tmp_path}/state", tmp_path / "cache") as shared:
        assert summary(shared) == before
        shared.unregister("default", "a1")
        after = summary(shared)
    with Registry(tmp_path / "state", *LIMITS_AND_SHAPE) as alone:
        assert summary(alone) == after
        assert alone.open(adapter(2).digest) == adapter(2)


def test_two_processes_lose_nothing_and_a_third_sees_it(tmp_path: Path) -> None:
    """120 registrations, 20 pairs of them for names that both want; the claim makes 200."""
    result = together(f"file://{tmp_path}/store", 60)
    assert result["wrong"] == 0
    assert (result["registrations"], result["refused"]) == (120, 20)


def test_a_process_that_is_killed_leaves_what_it_acknowledged(tmp_path: Path) -> None:
    memory = Path("/dev/shm")  # noqa: S108  (nothing here needs a disk)
    place = ["--directory", str(memory)] if os.access(memory, os.W_OK) else []
    flags = ["--json", "--shared", "--server-cycles", "0", "--cycles", "6", *place]
    command = [sys.executable, "-m", "benchmarks.crashes", *flags]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert (result["wrong"], result["cycles"]) == (0, 6), result["registry"]["what"]
