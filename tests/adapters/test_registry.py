"""The registry: versions, idempotence, tenants, content that stays while it is used."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mora_serve.adapters.card import RoutingCard
from mora_serve.adapters.registry import AdapterRecord, Change, Registry
from mora_serve.adapters.validate import read_upload
from mora_serve.errors import (
    AlreadyExists,
    ConfigError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from tests.adapters.make import LIMITS, SHAPE, adapter, config, files, tensors

CARD = RoutingCard(tasks=("reverse", "echo"), prompts=("reverse kavo",), group="operations")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "state", LIMITS, SHAPE) as registry:
        yield registry


def reopened(registry_directory: Path, **changes: object) -> Registry:
    return Registry(registry_directory / "state", LIMITS, SHAPE, **changes)  # type: ignore[arg-type]


def blobs(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "state" / "blobs"))


def test_what_is_registered_is_found_as_it_was_given(registry: Registry) -> None:
    given = adapter(1)
    record, created = registry.register("default", "reverse", given, card=CARD)
    assert created
    assert registry.get("default", "reverse") == record
    assert (record.digest, record.rank, record.nbytes) == (given.digest, 4, given.nbytes)
    assert (record.version, record.targets, record.modules) == (1, ("q_proj",), 2)
    assert (record.card, record.tasks) == (CARD, ("reverse", "echo"))
    assert not registry.verified(record)
    assert abs(record.created - time.time()) < 3600
    assert registry.open(record.digest) == given


def test_everything_survives_a_restart(registry: Registry, tmp_path: Path) -> None:
    registry.register("default", "a", adapter(1), card=CARD)
    registry.register("default", "a", adapter(2), replace=True)
    registry.register("other", "a", adapter(3))
    registry.pin("default", "a", True)
    registry.update("default", "a", tasks=["sort"])
    registry.set_router({"router.json": b"{}", "router.safetensors": b"12345"})
    with reopened(tmp_path) as again:
        assert again.all() == registry.all()
        assert again.revision == registry.revision == 6
        assert again.get("default", "a").pinned
        assert again.router() == {"router.json": b"{}", "router.safetensors": b"12345"}
        assert again.open(again.get("other", "a").digest) == adapter(3)


def test_the_same_content_again_changes_nothing(registry: Registry) -> None:
    first, _ = registry.register("default", "a", adapter(1), card=CARD)
    for replacing in (False, True):
        again = registry.register("default", "a", adapter(1), tasks=["else"], replace=replacing)
        assert again == (first, False)
    assert registry.revision == 1


def test_other_content_needs_replace_and_makes_a_version(
    registry: Registry, tmp_path: Path
) -> None:
    first, _ = registry.register("default", "a", adapter(1))
    with pytest.raises(AlreadyExists, match=rf"version 1 .*{first.digest}; set replace to make v"):
        registry.register("default", "a", adapter(2))
    assert blobs(tmp_path) == {first.digest}
    registry.pin("default", "a", True)
    second, created = registry.register("default", "a", adapter(2), replace=True)
    assert (created, second.version, second.pinned) == (True, 2, True)
    assert blobs(tmp_path) == {second.digest}
    with pytest.raises(NotFound, match=rf"version is now 2 with digest {second.digest}"):
        registry.get("default", "a", first.digest)
    assert registry.get("default", "a", second.digest) == second


def test_tenants_see_only_their_own(registry: Registry) -> None:
    registry.register("one", "shared-name", adapter(1), tasks=["reverse"])
    registry.register("two", "shared-name", adapter(2), tasks=["sort"])
    assert registry.get("one", "shared-name").digest != registry.get("two", "shared-name").digest
    assert [r.tenant for r in registry.list("one")] == ["one"]
    assert registry.tasks("one") == ("reverse",)
    for call in (registry.get, registry.by_task, registry.unregister):
        with pytest.raises(NotFound) as e:
            call("three", "shared-name")
        assert "did you mean" not in e.value.message


def test_an_unknown_name_is_answered_with_the_nearest(registry: Registry) -> None:
    for i, name in enumerate(("reverse", "uppercase", "vowels")):
        registry.register("default", name, adapter(i), tasks=[f"{name}-task"])
    with pytest.raises(NotFound, match=r"'revrese' is not registered; did you mean reverse\?") as e:
        registry.get("default", "revrese")
    assert (e.value.reason, e.value.field) == ("ADAPTER_NOT_FOUND", "adapter")
    with pytest.raises(NotFound, match="did you mean uppercase-task") as e:
        registry.by_task("default", "upercase-task")
    assert e.value.reason == "TASK_NOT_FOUND"
    with pytest.raises(NotFound, match="list the known adapters"):
        registry.get("default", "0" * 10_000)
    for call in (
        lambda: registry.pin("default", "x", True),
        lambda: registry.update("default", "x", tasks=[]),
    ):
        with pytest.raises(NotFound):
            call()


def test_tasks_find_all_their_adapters(registry: Registry) -> None:
    for i, (name, tasks) in enumerate({"b": ["t"], "a": ["t", "u"], "c": []}.items()):
        registry.register("default", name, adapter(i), tasks=tasks)
    assert [r.name for r in registry.by_task("default", "t")] == ["a", "b"]
    assert registry.tasks("default") == ("t", "u")
    registry.update("default", "a", tasks=["u"])
    assert [r.name for r in registry.by_task("default", "t")] == ["b"]


def test_a_card_is_updated_without_a_new_version(registry: Registry) -> None:
    before, _ = registry.register("default", "a", adapter(1), card=CARD)
    after = registry.update("default", "a", card=RoutingCard(prompts=("x",)), tasks=["t"])
    assert after == replace(before, card=RoutingCard(prompts=("x",), tasks=("t",)))
    with pytest.raises(InvalidArgument, match="prompts"):
        registry.update("default", "a", card=RoutingCard(prompts=("",)))
    assert registry.get("default", "a") == after


@pytest.mark.parametrize(("tenant", "name"), [("default", "../x"), ("", "a"), ("A", "a")])
def test_bad_names_are_refused(registry: Registry, tenant: str, name: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a valid name"):
        registry.register(tenant, name, adapter(1))


def test_the_number_of_adapters_is_limited_over_all_tenants(tmp_path: Path) -> None:
    with Registry(None, replace(LIMITS, max_adapters=2), SHAPE) as registry:
        registry.register("one", "a", adapter(1))
        registry.register("two", "a", adapter(2))
        with pytest.raises(ResourceExhausted, match="unregister one or raise the limit"):
            registry.register("one", "b", adapter(3))
        registry.register("one", "a", adapter(3), replace=True)
        registry.unregister("two", "a")
        registry.register("one", "b", adapter(4))


def test_one_content_under_two_names_is_stored_once(registry: Registry, tmp_path: Path) -> None:
    first, _ = registry.register("default", "a", adapter(1))
    registry.register("other", "b", adapter(1))
    assert blobs(tmp_path) == {first.digest}
    registry.unregister("default", "a")
    assert registry.open(first.digest) == adapter(1)
    registry.unregister("other", "b")
    assert blobs(tmp_path) == set()


def test_a_retained_version_stays_until_it_is_released(registry: Registry, tmp_path: Path) -> None:
    registry.register("default", "a", adapter(1))
    old = registry.get("default", "a")
    registry.retain(old.digest)
    registry.retain(old.digest)
    new, _ = registry.register("default", "a", adapter(2), replace=True)
    registry.unregister("default", "a")
    assert registry.open(old.digest) == adapter(1)
    registry.release(old.digest)
    assert registry.open(old.digest) == adapter(1)
    assert blobs(tmp_path) == {old.digest}
    registry.release(old.digest)
    assert blobs(tmp_path) == set()
    for digest in (old.digest, new.digest):
        for call in (registry.open, registry.retain):
            with pytest.raises(NotFound, match="is not stored"):
                call(digest)


def test_an_open_content_outlives_its_removal(registry: Registry, tmp_path: Path) -> None:
    record, _ = registry.register("default", "a", adapter(1))
    opened = registry.open(record.digest)
    registry.unregister("default", "a")
    assert blobs(tmp_path) == set()
    m = opened.modules[0]
    np.testing.assert_array_equal(opened.array(m.a), adapter(1).array(m.a))


@pytest.mark.parametrize("digest", ["", ".", "..", "../log", "/etc", "a" * 63, "A" * 64])
def test_a_digest_cannot_name_a_file_elsewhere(registry: Registry, digest: str) -> None:
    for call in (registry.open, registry.retain):
        with pytest.raises(NotFound):
            call(digest)


def test_subscribers_see_every_change_in_order(registry: Registry) -> None:
    registry.register("default", "a", adapter(1))
    seen: list[Change] = []
    now = registry.subscribe(seen.append)
    assert [r.name for r in now] == ["a"]
    registry.register("default", "a", adapter(2), replace=True)
    registry.pin("default", "a", True)
    registry.pin("default", "a", True)
    registry.set_router({"r": b"1"})
    registry.unregister("default", "a")

    def versions(record: AdapterRecord | None) -> int | None:
        return record.version if record else None

    assert [(c.revision, versions(c.before), versions(c.after)) for c in seen] == [
        (2, 1, 2),
        (3, 2, 2),
        (4, None, None),
        (5, 2, None),
    ]
    assert seen[2].router is not None
    assert registry.revision == 5


def test_the_router_is_replaced_as_a_whole(registry: Registry, tmp_path: Path) -> None:
    assert registry.router() is None
    first = registry.set_router({"router.json": b"{}", "keys": b"1"})
    assert registry.set_router({"keys": b"1", "router.json": b"{}"}) == first
    assert registry.revision == 1
    second = registry.set_router({"router.json": b"[]"})
    assert registry.router() == {"router.json": b"[]"}
    assert blobs(tmp_path) == {second}
    with pytest.raises(InvalidArgument, match="router"):
        registry.set_router({"../router.json": b""})


def test_a_snapshot_replaces_the_changes_before_it(tmp_path: Path) -> None:
    with reopened(tmp_path, snapshot_every=5) as registry:
        registry.set_router({"r": b"1"})
        for i in range(11):
            registry.register("default", f"a{i}", adapter(i % 3), card=CARD)
            assert len(os.listdir(tmp_path / "state" / "log")) < 10
        assert len(os.listdir(tmp_path / "state" / "snapshots")) == 2  # one in reserve
        with reopened(tmp_path) as again:
            assert (again.all(), again.revision) == (registry.all(), 12)
            assert again.router() == {"r": b"1"}
            seen: list[Change] = []
            again.subscribe(seen.append)
            for i in range(11):
                registry.unregister("default", f"a{i}")
            again.refresh()  # its place in the log is gone: it has to start from the snapshot
            assert (again.all(), again.revision) == ((), registry.revision)
            assert {c.before.name for c in seen if c.before} == {f"a{i}" for i in range(11)}
            again.register("default", "new", adapter(1))
            registry.refresh()
            assert registry.all() == again.all()


def test_two_registries_of_one_directory_agree(registry: Registry, tmp_path: Path) -> None:
    """The loser of a change takes in the winner's and decides again."""
    with reopened(tmp_path) as other:
        registry.register("default", "a", adapter(1))
        with pytest.raises(AlreadyExists):
            other.register("default", "a", adapter(2))
        assert other.get("default", "a") == registry.get("default", "a")
        other.register("default", "b", adapter(2))
        registry.retain(other.get("default", "b").digest)
        other.unregister("default", "b")
        assert registry.open(adapter(2).digest) == adapter(2)  # held by the other process
        registry.release(adapter(2).digest)
        registry.refresh()
        assert [r.name for r in registry.all()] == ["a"]
    with reopened(tmp_path) as last:
        assert blobs(tmp_path) == {last.get("default", "a").digest}


def test_a_content_that_another_process_took_up_again_is_not_removed(
    registry: Registry, tmp_path: Path
) -> None:
    registry.register("default", "kept", adapter(2))
    registry.register("default", "a", adapter(1))
    with reopened(tmp_path) as other:
        registry.retain(adapter(1).digest)
        registry.unregister("default", "a")  # cannot be removed now, so it will be tried again
        other.register("default", "b", adapter(1))
        registry.release(adapter(1).digest)  # tries, not knowing of "b"
        assert [r.name for r in registry.all()] == ["kept"]
        assert other.open(adapter(1).digest) == adapter(1)


def held(registry: Registry, name: str) -> AdapterRecord:
    """The adapter of this name, retained; it may be replaced between the two."""
    while True:
        record = registry.get("default", name)
        with contextlib.suppress(NotFound):
            registry.retain(record.digest)
            return record


def test_threads_register_and_read_at_the_same_time(registry: Registry, tmp_path: Path) -> None:
    contents = [adapter(i) for i in range(4)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(6):
                name = f"a{(number + i) % 3}"
                registry.register("default", name, contents[(number + i) % 4], replace=True)
                record = held(registry, name)
                assert registry.open(record.digest).digest == record.digest
                registry.release(record.digest)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert blobs(tmp_path) == {r.digest for r in registry.all()}
    with reopened(tmp_path) as again:
        assert again.all() == registry.all()


def test_a_base_that_changed_between_runs_is_noticed(tmp_path: Path) -> None:
    named = replace(CARD, base_fingerprint="aaaa")
    data = files(config(), tensors(projections=("q_proj",)))
    with Registry(tmp_path, LIMITS, SHAPE, "aaaa") as registry:
        given = read_upload(*data, named.to_json(), SHAPE, LIMITS, "aaaa")
        record, _ = registry.register("default", "named", given, card=CARD)
        assert registry.verified(record)
        assert registry.verified(registry.update("default", "named", card=CARD))
        registry.register("default", "unnamed", adapter(1))
        with pytest.raises(InvalidArgument, match="names base bbbb, this server runs aaaa"):
            registry.update("default", "named", card=replace(CARD, base_fingerprint="bbbb"))
    with Registry(tmp_path, LIMITS, replace(SHAPE, hidden_size=64), "bbbb") as registry:
        assert len(registry.list("default")) == 2
        assert [r.name for r in registry.served("default")] == ["unnamed"]
        assert not registry.verified(record)
        assert not registry.routable(record)
        assert [r.name for r in registry.all()] == ["unnamed"]
        assert registry.tasks("default") == ()
        with pytest.raises(NotFound):
            registry.by_task("default", "reverse")
        with pytest.raises(FailedPrecondition, match="trained on base aaaa, this server runs bbbb"):
            registry.get("default", "named")
        with pytest.raises(FailedPrecondition, match="registered for another base"):
            registry.open(registry.get("default", "unnamed").digest)
        registry.unregister("default", "named")


def test_what_killed_processes_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    with reopened(tmp_path) as registry:
        registry.register("default", "a", adapter(1))
    left = tmp_path / "state" / "tmp"
    for name in ("old", "young"):
        (left / name).mkdir()
        (left / name / "adapter_model.safetensors").write_bytes(b"123")
        (left / f"{name}.json").write_text("{}")
    (tmp_path / "state" / "blobs" / ("0" * 64)).mkdir()
    for name in ("old", "old.json"):
        os.utime(left / name, (0, 0))
    with reopened(tmp_path) as registry:
        assert sorted(os.listdir(left)) == ["young", "young.json"]
        assert blobs(tmp_path) == {r.digest for r in registry.all()}


@pytest.mark.parametrize("content", [{"format": 99, "content": {}}, "summed"])
def test_a_history_of_another_version_is_an_error_and_not_a_loss(
    tmp_path: Path, content: object
) -> None:
    """What is whole, but not understood, is for the version that wrote it."""
    with reopened(tmp_path) as registry:
        registry.register("default", "a", adapter(1))
        kept = blobs(tmp_path)
        if content == "summed":
            registry._log.append(2, {"promote": "a"})
    if content != "summed":
        file = tmp_path / "state" / "log" / f"{2:020d}.json"
        file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"server.state: cannot read number 2 .*backup") as e:
        reopened(tmp_path)
    assert str(tmp_path) not in e.value.message
    assert blobs(tmp_path) == kept


def test_a_lost_content_is_reported_and_can_be_registered_again(tmp_path: Path) -> None:
    with reopened(tmp_path) as registry:
        record, _ = registry.register("default", "a", adapter(1))
        (tmp_path / "state" / "blobs" / record.digest).rename(tmp_path / "lost")
        for call in (
            lambda: registry.open(record.digest),
            lambda: registry.retain(record.digest),
        ):
            with pytest.raises(NotFound, match="register the adapter again"):
                call()
        assert registry.register("default", "a", adapter(1)) == (record, False)
        assert registry.open(record.digest) == adapter(1)


def test_a_registry_without_a_directory_is_gone_with_its_run() -> None:
    with Registry(None, LIMITS, SHAPE) as registry:
        record, _ = registry.register("default", "a", adapter(1))
        opened = registry.open(record.digest)
    assert opened == adapter(1)


def test_a_content_that_is_being_opened_when_it_is_removed_goes_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry(tmp_path / "state", LIMITS, SHAPE) as registry:
        given = adapter(1)
        digest = registry.register("default", "once", given)[0].digest
        read = registry._blobs.read

        def read_late(digest: str, name: str) -> bytes:
            if registry.list("default"):
                registry.unregister("default", "once")
            return read(digest, name)

        monkeypatch.setattr(registry._blobs, "read", read_late)
        assert registry.open(digest) == given
        assert blobs(tmp_path) == set()
