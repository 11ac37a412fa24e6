"""Stores of objects: one creator a name, and errors that tell nothing they should not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from benchmarks.shared_registry import s3
from mora_serve.adapters import objects as module
from mora_serve.adapters.objects import MemoryObjects, Objects, open_objects
from mora_serve.errors import ConfigError, ResourceExhausted, Unavailable
from tests.adapters.stores import file_objects, memory_objects, memory_url, opened


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3() as url:
        yield url


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    if request.param == "memory":
        return open_objects(memory_url())
    if request.param == "file":
        return open_objects(f"file://{tmp_path}/store")
    return open_objects(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_what_is_written_is_read_listed_and_removed(store: Objects, tmp_path: Path) -> None:
    assert store.read("log/1") is None
    assert store.sizes("log") == {}
    assert store.create("log/1", b"one")
    store.put("blobs/a/config", file(tmp_path / "x", b"12345"))
    store.put("blobs/a/config", file(tmp_path / "x", b"1234"))
    store.put("blobs/b/config", tmp_path / "x")
    assert store.read("log/1") == b"one"
    assert store.read_all(["log/1", "log/2", "blobs/a/config"]) == {
        "log/1": b"one",
        "blobs/a/config": b"1234",
    }
    assert store.sizes("log") == {"1": 3}
    assert store.sizes("blobs/a") == {"config": 4}
    assert sorted(store.folders("blobs")) == ["a", "b"]
    assert store.get("blobs/a/config", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"1234"
    assert not store.get("blobs/c/config", tmp_path / "none")
    written = store.written("log/1") or 0.0
    assert 0 <= store.now() - written < 3600
    assert store.written("log/2") is None
    assert not store.sizes("tmp")
    store.remove("log/1")
    store.remove("log/1")
    assert store.read("log/1") is None


def test_of_many_that_create_a_name_one_does(store: Objects) -> None:
    made: list[int] = []

    def create(number: int) -> None:
        if store.create("log/1", b"%d" % number):
            made.append(number)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(made) == 1
    assert store.read("log/1") == b"%d" % made[0]


@pytest.mark.parametrize("error", [TimeoutError("secret"), FileExistsError(), OSError(5, "x")])
def test_an_answer_that_is_lost_is_no_refusal(error: Exception) -> None:
    """The store made the object, and the library's second attempt met the first one's."""

    class Lossy(MemoryObjects):
        def _create(self, path: str, data: bytes) -> None:
            super()._create(path, data)
            raise error

    store = memory_objects(Lossy)
    assert store.create("log/1", b"mine")
    store.remove("log/1")
    MemoryObjects._create(store, store._path("log/1"), b"theirs")
    assert not store.create("log/1", b"mine")


class Broken(MemoryObjects):
    """A store whose library raises what names its address and key."""

    broken = True

    @property
    def _fs(self) -> Any:
        if self.broken:
            raise ConnectionError("https://secret-bucket.example/?key=AKIASECRET refused")
        return self._whole

    @_fs.setter
    def _fs(self, fs: Any) -> None:
        self._whole = fs


CALLS: dict[str, Callable[[Objects, Path], object]] = {
    "read": lambda o, _: o.read("a"),
    "read_all": lambda o, _: o.read_all(["a"]),
    "create": lambda o, _: o.create("a", b""),
    "put": lambda o, p: o.put("a", p),
    "get": lambda o, p: o.get("a", p),
    "sizes": lambda o, _: o.sizes("a"),
    "folders": lambda o, _: o.folders("a"),
    "written": lambda o, _: o.written("a"),
    "now": lambda o, _: o.now(),
    "remove": lambda o, _: o.remove("a"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_store_that_fails_is_unavailable_and_named_nowhere(
    call: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = memory_objects(Broken)
    with pytest.raises(Unavailable) as caught:
        CALLS[call](store, tmp_path / "x")
    assert (caught.value.reason, caught.value.field) == ("STORE_UNAVAILABLE", "server.store")
    assert caught.value.retry_after is not None
    for text in (caught.value.message, caplog.text):
        assert "secret" not in text.lower()
    assert "ConnectionError" in caplog.text


def test_a_disk_that_is_full_is_not_the_store_s_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = memory_objects()
    store.create("a", b"1")

    def get_file(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store._fs, "get_file", get_file)
    with pytest.raises(ResourceExhausted) as caught:
        store.get("a", tmp_path / "a")
    assert caught.value.reason == "DISK_FULL"
    assert store.read("a") == b"1"
    assert not caplog.records


def test_a_failure_is_logged_once_and_its_end_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    store = memory_objects(Broken)
    for _ in range(3):
        with pytest.raises(Unavailable):
            store.read("a")
    store.broken = False
    assert store.read("a") is None
    assert [r.levelname for r in caplog.records] == ["ERROR", "WARNING"]


def test_after_a_failure_reads_fail_at_once_for_a_moment() -> None:
    """A hundred requests need not wait for as many time-outs."""
    store = memory_objects(Broken)
    with pytest.raises(Unavailable):
        store.read("a")
    store.broken = False
    with pytest.raises(Unavailable):
        store.read("a")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            assert store.read("a") is None
            break
        except Unavailable:
            time.sleep(0.1)
    assert time.monotonic() < end


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:9/registry", "of kind 'http'"),
        ("nothing://x", "cannot be opened"),
        ("zip://x::file:///none.zip", "server.store"),
        ("gs://bucket/x", "not installed"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        open_objects(url)
    assert caught.value.field == "server.store"
    assert "none.zip" not in caught.value.message
    assert "9/registry" not in caught.value.message


def test_a_store_that_overwrites_what_it_should_create_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As servers that speak S3 and ignore If-None-Match do."""
    memory = fsspec.filesystem("memory")

    def pipe_file(path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        type(memory).pipe_file(memory, path, value)

    monkeypatch.setattr(memory, "pipe_file", pipe_file)
    with pytest.raises(ConfigError, match="overwrites an object"):
        open_objects(memory_url())


def test_s3_that_does_not_answer_is_told_at_the_start_and_in_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRET")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    with pytest.raises(ConfigError, match="cannot be reached") as caught:
        open_objects("s3://bucket1/registry")
    for hidden in ("127.0.0.1", "AKIASECRET", "bucket1"):
        assert hidden not in caught.value.message


def test_what_the_operator_sets_for_s3_counts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"config_kwargs": {"s3": {"addressing_style": "path"}, "read_timeout": 20}}
    monkeypatch.setitem(fsspec.config.conf, "s3", given)
    config = open_objects(f"{bucket}/settings")._fs.s3.meta.config
    assert config.s3["addressing_style"] == "path"
    assert (config.read_timeout, config.connect_timeout) == (20, 2)


def test_a_registry_lies_in_a_bucket(bucket: str) -> None:
    from tests.adapters.make import adapter

    with opened(f"{bucket}/whole") as ours, opened(f"{bucket}/whole") as theirs:
        for i in range(4):
            ours.register("default", f"a{i}", adapter(i))
        theirs.poll()
        assert [r.name for r in theirs.list("default")] == ["a0", "a1", "a2", "a3"]
        assert theirs.open(adapter(2).digest) == adapter(2)
        theirs.unregister("default", "a2")
        theirs.set_router({"r": b"1"})
        ours.poll()
        assert [r.name for r in ours.list("default")] == ["a0", "a1", "a3"]
        assert ours.router() == {"r": b"1"}
    with opened(f"{bucket}/whole") as again:
        assert again.revision == ours.revision


def test_a_name_that_may_not_last_is_not_acknowledged_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another server may have read it: its number given to another change would part the two."""
    store = file_objects(tmp_path)
    store.create("log/1", b"1")

    def fails(_: Path) -> None:
        raise OSError(5, "secret")

    monkeypatch.setattr(module, "sync_directory", fails)
    with pytest.raises(Unavailable, match="did not say"):
        store.create("log/2", b"2")
    assert "Input/output error" in caplog.text
    assert "secret" not in caplog.text
    assert not store.create("log/1", b"2")
    assert not store.create("log/2", b"3")
    assert not os.listdir(tmp_path / "tmp")


def test_files_of_a_killed_process_go_when_they_are_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock of the machine that has the directory."""
    store = file_objects(tmp_path)
    store.create("log/1", b"1")
    for name, age in (("old", 7200), ("new", 0)):
        path = file(tmp_path / "tmp" / name, b"half")
        os.utime(path, (time.time() - age,) * 2)
    ahead = time.time() + 1e6
    monkeypatch.setattr("time.time", lambda: ahead)
    store.clean()
    assert os.listdir(tmp_path / "tmp") == ["new"]
