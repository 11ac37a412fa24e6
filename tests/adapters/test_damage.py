"""A registry whose disk was damaged: what is broken is set aside, and the rest is served."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mora_serve.adapters.contents import Contents
from mora_serve.adapters.files import CONFIG, WEIGHTS
from mora_serve.adapters.quarantine import Quarantine
from mora_serve.adapters.registry import Change, Registry
from mora_serve.errors import FailedPrecondition, MoraError, NotFound
from tests.adapters.make import LIMITS, SHAPE, adapter


def opened(state: Path, **options: int) -> Registry:
    return Registry(state, LIMITS, SHAPE, **options)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Three adapters with two contents, and a router."""
    with opened(tmp_path / "state") as registry:
        registry.register("default", "a", adapter(1), tasks=["t"])
        registry.register("other", "b", adapter(1), tasks=["t"])
        registry.register("default", "c", adapter(2), tasks=["t"])
        registry.set_router({"r": b"12345"})
        registry.pin("default", "a", True)
    return tmp_path / "state"


def blob(state: Path, seed: int = 1) -> Path:
    return state / "blobs" / adapter(seed).digest


def quarantined(state: Path) -> list[str]:
    return sorted(os.listdir(state / "quarantine"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda blob: flip(blob / WEIGHTS),
    "a flipped bit of the configuration": lambda blob: flip(blob / CONFIG),
    "torn": lambda blob: os.truncate(blob / WEIGHTS, 100),
    "empty": lambda blob: os.truncate(blob / WEIGHTS, 0),
    "without weights": lambda blob: (blob / WEIGHTS).unlink(),
    "with another file": lambda blob: (blob / "more").write_text("x"),
    "a file for a directory": lambda blob: (blob.rename(blob.parent / "x"), blob.write_text("")),
    "gone": lambda blob: blob.rename(blob.parent.parent / "elsewhere"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_content_is_not_offered_and_the_rest_is(state: Path, how: str) -> None:
    """Under none of its names, nor after another start, until the same content is registered."""
    DAMAGE[how](blob(state))
    for _ in range(2):
        with opened(state) as registry:
            assert [r.name for r in registry.all()] == ["c"]
            assert [r.name for r in registry.list("default")] == ["a", "c"]
            assert [r.name for r in registry.served("default")] == ["c"]
            assert [r.name for r in registry.by_task("default", "t")] == ["c"]
            assert registry.tasks("other") == ()
            with pytest.raises(FailedPrecondition, match=r"'a' is damaged .* register") as e:
                registry.get("default", "a")
            assert e.value.reason == "ADAPTER_DAMAGED"
            with pytest.raises(NotFound, match="register the adapter again"):
                registry.open(adapter(1).digest)
            assert registry.open(adapter(2).digest) == adapter(2)
            assert registry.router() == {"r": b"12345"}
            assert not blob(state).exists()
    if how != "gone":
        assert len([n for n in quarantined(state) if n.startswith("blobs-")]) == 1
    with opened(state) as registry:
        record, created = registry.register("default", "a", adapter(1))
        assert (created, record.version, record.pinned, record.tasks) == (False, 1, True, ("t",))
        assert registry.open(record.digest) == adapter(1)
        assert [r.name for r in registry.all()] == ["a", "c", "b"]
    with opened(state) as registry:
        assert [r.name for r in registry.all()] == ["a", "c", "b"]


@pytest.mark.parametrize("how", ["a flipped bit", "torn", "without weights"])
def test_what_cannot_be_set_aside_is_not_offered_either(
    state: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither now nor after a restart; its removal works, and then so does its registration."""
    DAMAGE[how](blob(state))
    with monkeypatch.context() as m:
        m.setattr(os, "rename", refuse)
        for _ in range(2):
            with opened(state) as registry:
                assert [r.name for r in registry.all()] == ["c"]
                with pytest.raises(FailedPrecondition):
                    registry.get("default", "a")
                with pytest.raises(MoraError) as e:
                    registry.register("default", "a", adapter(1))
                assert e.value.reason == "DISK_FAILED"
                assert [r.name for r in registry.all()] == ["c"]
        with opened(state) as registry:
            registry.unregister("default", "a")
    with opened(state) as registry:
        assert [r.name for r in registry.list("default")] == ["c"]
        registry.register("default", "a", adapter(1))
        assert registry.open(registry.get("default", "a").digest) == adapter(1)


def test_damage_under_a_running_server_is_found_when_the_content_is_opened(state: Path) -> None:
    """Subscribers hear of it as of a removal, and of its repair as of a registration."""
    with opened(state) as registry:
        seen: list[Change] = []
        registry.subscribe(seen.append)
        revision = registry.revision
        flip(blob(state) / WEIGHTS)
        for _ in range(2):
            with pytest.raises(NotFound):
                registry.open(adapter(1).digest)
        assert [(c.before and c.before.name, c.after) for c in seen] == [("a", None), ("b", None)]
        assert registry.revision > revision
        registry.pin("default", "a", False)  # the record is still there, but not offered
        registry.unregister("other", "b")
        assert len(seen) == 2
        registry.register("default", "a", adapter(1))
        assert [(c.before, c.after and c.after.name) for c in seen[2:]] == [(None, "a")]
        assert registry.open(adapter(1).digest) == adapter(1)


def test_a_replacement_of_a_damaged_content_is_like_a_registration(state: Path) -> None:
    flip(blob(state) / WEIGHTS)
    with opened(state) as registry:
        seen: list[Change] = []
        registry.subscribe(seen.append)
        record, _ = registry.register("default", "a", adapter(3), replace=True)
        assert (record.version, record.pinned) == (2, True)
        assert [(c.before, c.after) for c in seen] == [(None, record)]


def test_a_content_that_is_found_missing_when_a_request_holds_it_is_withdrawn(state: Path) -> None:
    """So that the next decision goes to another adapter."""
    with opened(state) as registry:
        blob(state).rename(state / "elsewhere")
        with pytest.raises(NotFound):
            registry.retain(adapter(1).digest)
        assert [r.name for r in registry.all()] == ["c"]


def test_another_process_repairs_what_this_one_found_damaged(state: Path) -> None:
    flip(blob(state) / WEIGHTS)
    with opened(state) as ours, opened(state) as theirs:
        theirs.register("default", "a", adapter(1))
        assert ours.get("default", "a").digest == adapter(1).digest
        assert ours.open(adapter(1).digest) == adapter(1)


def test_a_content_that_was_removed_by_another_process_is_not_damaged(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(state) as ours, opened(state) as theirs:
        theirs.unregister("default", "c")
        with pytest.raises(NotFound):
            ours.open(adapter(2).digest)
    assert not caplog.records


def test_a_damaged_router_is_as_none_until_it_is_stored_again(state: Path) -> None:
    with opened(state) as registry:
        digest = registry.set_router({"r": b"12345"})
        flip(state / "blobs" / digest / "r")
    for _ in range(2):
        with opened(state) as registry:
            assert registry.router() is None
            assert len(registry.all()) == 3
    with opened(state) as registry:
        registry.set_router({"r": b"12345"})
        assert registry.router() == {"r": b"12345"}


def test_a_damaged_change_loses_itself_alone_and_keeps_contents(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The content that it may have been about goes to the quarantine, not into nothing."""
    (state / "log" / f"{3:020d}.json").write_bytes(b"")
    with opened(state) as registry:
        assert [r.name for r in registry.all()] == ["a", "b"]
        assert registry.get("default", "a").pinned
        registry.register("default", "d", adapter(3))
    text = caplog.text
    assert "change number 3 is damaged; set aside as quarantine/" in text
    assert adapter(2).digest in text
    assert [n.partition("-")[0] for n in quarantined(state)] == ["blobs", "log"]
    with opened(state) as registry:
        assert [r.name for r in registry.all()] == ["a", "d", "b"]


def test_a_damaged_snapshot_loses_nothing(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with opened(state, snapshot_every=4) as registry:
        for i in range(10):
            registry.register("default", f"a{i}", adapter(i % 3), tasks=["t"])
        before = registry.all()
    for file in sorted((state / "snapshots").iterdir())[1:]:
        flip(file)
    with opened(state) as registry:
        assert registry.all() == before
    assert len(quarantined(state)) == 1


def test_where_all_history_is_lost_the_contents_are_kept(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with opened(state, snapshot_every=2) as registry:
        for i in range(6):
            registry.register("default", f"a{i}", adapter(i))
    for file in (state / "snapshots").iterdir():
        file.write_bytes(b"")
    with opened(state) as registry:
        lost = 6 - len(registry.all())
        assert lost > 0
        registry.register("default", "new", adapter(9))
    assert len([n for n in quarantined(state) if n.startswith("blobs-")]) == lost


def test_a_large_state_is_checked_as_it_is_used(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bytes whose sums the start forms, it looks only for what is missing."""
    monkeypatch.setattr("mora_serve.adapters.registry.CHECKED_AT_START", 0)
    flip(blob(state) / WEIGHTS)
    os.truncate(blob(state, 2) / WEIGHTS, 10)
    with opened(state) as registry:
        assert [r.name for r in registry.all()] == ["a", "b"]
        with pytest.raises(NotFound):
            registry.open(adapter(1).digest)
        assert registry.all() == ()


def test_a_whole_state_is_opened_without_a_word(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), opened(state) as registry:
        registry.open(adapter(1).digest)
    assert not caplog.records
    assert not (state / "quarantine").exists()


def lost(state: Path) -> None:
    """Damage a change of the log on the disk, in both places where it stands."""
    change = sorted((state / "log").iterdir())[-1]
    change.write_bytes(b"x" * change.stat().st_size)


def test_where_changes_are_lost_a_content_that_is_being_registered_stays(state: Path) -> None:
    """Another process holds it, and is about to refer to it; once nobody does it is set aside."""
    lost(state)
    given = adapter(3)
    with Contents(state, Quarantine(state / "quarantine")).put(
        given.digest, {CONFIG: given.config, WEIGHTS: given.weights}
    ):
        opened(state).close()
        assert blob(state, 3).is_dir()
    opened(state).close()
    assert not blob(state, 3).exists()
    assert len([n for n in quarantined(state) if given.digest in n]) == 1


def test_where_changes_are_lost_a_content_that_was_registered_meanwhile_stays(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for what nothing refers to and its being set aside."""
    lost(state)
    left = Contents.left
    with opened(state) as live:

        def left_before(self: Contents, referenced: frozenset[str]) -> list[str]:
            live.register("default", "late", adapter(3))
            return left(self, referenced)

        monkeypatch.setattr(Contents, "left", left_before)
        with opened(state) as starting:
            monkeypatch.undo()
            assert starting.open(adapter(3).digest) == adapter(3)
            starting.refresh()
            assert starting.get("default", "late").digest == adapter(3).digest


@pytest.mark.parametrize("how", ["a flipped bit", "a file for a directory"])
def test_what_is_put_in_the_place_of_a_damaged_content_is_not_set_aside(
    state: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """By another process that found the damage too, and registers the content again."""
    with opened(state) as ours, opened(state) as theirs:
        DAMAGE[how](blob(state))
        repair = threading.Thread(target=theirs.register, args=("default", "a", adapter(1)))
        take = Quarantine.take

        def take_late(self: Quarantine, path: Path, what: str) -> bool:
            if path == blob(state) and threading.current_thread() is not repair:
                repair.start()
                repair.join(1)  # it is done by then, or waits for this
            return take(self, path, what)

        monkeypatch.setattr(Quarantine, "take", take_late)
        with pytest.raises(NotFound):
            ours.open(adapter(1).digest)
        repair.join(60)
        assert theirs.open(adapter(1).digest) == adapter(1)
        assert ours.open(ours.get("default", "a").digest) == adapter(1)


def test_damage_is_set_aside_though_a_request_holds_the_content(state: Path) -> None:
    """So that registering it again helps at once."""
    with opened(state) as registry:
        registry.retain(adapter(1).digest)
        flip(blob(state) / WEIGHTS)
        with pytest.raises(NotFound):
            registry.open(adapter(1).digest)
        registry.register("default", "a", adapter(1))
        assert registry.open(adapter(1).digest) == adapter(1)
        registry.release(adapter(1).digest)
        assert registry.open(adapter(1).digest) == adapter(1)
