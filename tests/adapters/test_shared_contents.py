"""Contents in a store of objects, and their cache."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mora_serve.adapters.contents import Health
from mora_serve.adapters.files import CONFIG, WEIGHTS
from mora_serve.adapters.objects import MemoryObjects, Objects
from mora_serve.adapters.quarantine import Quarantine
from mora_serve.adapters.shared_contents import SharedContents
from mora_serve.adapters.validate import ValidatedAdapter
from mora_serve.errors import Unavailable
from tests.adapters.make import adapter
from tests.adapters.stores import memory_objects

SIZE = len(adapter(1).config) + len(adapter(1).weights)


def contents(
    objects: Objects, directory: Path, most: int = 1 << 30, spared: float = 0.0
) -> SharedContents:
    for name in ("blobs", "tmp"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    quarantine = Quarantine(directory / "quarantine")
    return SharedContents(objects, directory, quarantine, most, spared=spared)


def put(contents: SharedContents, given: ValidatedAdapter) -> None:
    files = {CONFIG: given.config, WEIGHTS: given.weights}
    with contents.put(given.digest, files):
        contents.confirm(given.digest, files)


def cached(directory: Path) -> set[str]:
    return set(os.listdir(directory / "blobs"))


def test_a_content_is_fetched_once_and_then_read_from_the_cache(tmp_path: Path) -> None:
    reads = []

    class Counting(MemoryObjects):
        def get(self, name: str, path: Path) -> bool:
            reads.append(name)
            time.sleep(0.05)
            return super().get(name, path)

    objects = memory_objects(Counting)
    put(contents(objects, tmp_path / "ours"), adapter(1))
    theirs = contents(objects, tmp_path / "theirs")
    threads = [threading.Thread(target=theirs.look, args=(adapter(1).digest,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert theirs.look(adapter(1).digest) is Health.SOUND
    assert len(reads) == 2  # its two files
    assert theirs.blobs.read(adapter(1).digest, CONFIG) == adapter(1).config


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_what_the_store_has_damaged_is_not_used_until_it_is_put_again(
    tmp_path: Path, file: str
) -> None:
    objects = memory_objects()
    put(contents(objects, tmp_path / "ours"), adapter(1))
    name = f"blobs/{adapter(1).digest}/{file}"
    data = objects.read(name) or b""
    objects._fs.pipe_file(objects._path(name), data[:-1] + bytes([data[-1] ^ 1]))
    theirs = contents(objects, tmp_path / "theirs")
    assert theirs.look(adapter(1).digest) is Health.DAMAGED
    assert cached(tmp_path / "theirs") == set()
    assert not theirs.again(adapter(1).digest)
    put(contents(objects, tmp_path / "third"), adapter(1))
    assert theirs.look(adapter(1).digest) is Health.SOUND


def test_a_copy_that_is_damaged_here_is_fetched_again(tmp_path: Path) -> None:
    ours = contents(memory_objects(), tmp_path)
    put(ours, adapter(1))
    (tmp_path / "blobs" / adapter(1).digest / WEIGHTS).write_bytes(b"x")
    assert ours.look(adapter(1).digest) is Health.SOUND
    assert ours.blobs.read(adapter(1).digest, WEIGHTS) == adapter(1).weights
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_a_copy_that_is_damaged_and_stays_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk does not let it be put away, so the store's cannot take its place."""
    ours = contents(memory_objects(), tmp_path)
    put(ours, adapter(1))
    (tmp_path / "blobs" / adapter(1).digest / WEIGHTS).write_bytes(b"x")
    monkeypatch.setattr(Quarantine, "take", lambda *_: False)
    for _ in range(2):
        assert ours.look(adapter(1).digest) is Health.DAMAGED


def test_the_cache_keeps_what_was_used_last_within_its_bytes(tmp_path: Path) -> None:
    objects = memory_objects()
    ours = contents(objects, tmp_path, most=3 * SIZE)
    for i in range(1, 4):
        put(ours, adapter(i))
        os.utime(tmp_path / "blobs" / adapter(i).digest, (i, i))
    assert ours.look(adapter(1).digest) is Health.SOUND  # used now
    put(ours, adapter(4))
    assert cached(tmp_path) == {adapter(i).digest for i in (1, 3, 4)}
    assert ours.look(adapter(2).digest) is Health.SOUND
    assert len(cached(tmp_path)) == 3


def test_what_is_held_stays_in_the_cache_and_what_was_used_just_now(tmp_path: Path) -> None:
    objects = memory_objects()
    ours = contents(objects, tmp_path, most=0)
    other = contents(objects, tmp_path, most=0)  # another process with the same cache
    put(ours, adapter(1))
    ours.trim()
    ours.retain(adapter(1).digest)  # before it is here
    assert cached(tmp_path) == set()
    assert ours.look(adapter(1).digest) is Health.SOUND
    other.trim()
    assert cached(tmp_path) == {adapter(1).digest}
    ours.release(adapter(1).digest)
    other.trim()
    assert cached(tmp_path) == set()
    spared = contents(objects, tmp_path / "first", spared=60.0)
    spared.look(adapter(1).digest)
    other = contents(objects, tmp_path / "first", most=0)
    with spared.blobs.hold(adapter(1).digest) or pytest.fail("it is gone"):
        other.trim()
        assert cached(tmp_path / "first") == {adapter(1).digest}
    spared = contents(objects, tmp_path / "second", most=0, spared=60.0)
    put(spared, adapter(3))
    assert cached(tmp_path / "second") == {adapter(3).digest}


def test_without_the_store_what_is_cached_is_used(tmp_path: Path) -> None:
    class Gone(MemoryObjects):
        gone = False

        def _path(self, name: str) -> str:
            if self.gone:
                raise ConnectionError
            return super()._path(name)

    objects = memory_objects(Gone)
    put(contents(objects, tmp_path / "ours"), adapter(1))
    put(contents(objects, tmp_path / "ours"), adapter(2))
    theirs = contents(objects, tmp_path / "theirs")
    theirs.look(adapter(1).digest)
    objects.gone = True
    assert theirs.look(adapter(1).digest) is Health.SOUND
    with pytest.raises(Unavailable):
        theirs.look(adapter(2).digest)
    objects.gone, objects._failed = False, -10.0
    assert theirs.look(adapter(2).digest) is Health.SOUND


def test_what_nobody_refers_to_is_collected_when_it_is_old(tmp_path: Path) -> None:
    objects = memory_objects()
    ours = contents(objects, tmp_path)
    for i in (1, 2):
        put(ours, adapter(i))
    kept = lambda: {adapter(1).digest}  # noqa: E731
    assert [ours.collect(kept, age=3600.0) for _ in range(2)] == [0, 0]
    assert [ours.collect(kept, age=0.0) for _ in range(2)] == [1, 0]
    assert objects.folders("blobs") == [adapter(1).digest]
    assert not objects.sizes("unreferenced")


class Clocked(MemoryObjects):
    """A store with a clock of its own."""

    clock = 0.0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._stamps: dict[str, float] = {}

    def create(self, name: str, data: bytes) -> bool:
        self._stamps.setdefault(name, self.clock)
        return super().create(name, data)

    def put(self, name: str, path: Path) -> None:
        self._stamps[name] = self.clock
        super().put(name, path)

    def remove(self, name: str) -> None:
        self._stamps.pop(name, None)
        super().remove(name)

    def written(self, name: str) -> float | None:
        return self._stamps.get(name)


def test_a_content_stays_for_a_while_after_its_last_reference_however_old_it_is(
    tmp_path: Path,
) -> None:
    """By the store's clock, whatever this machine's says."""
    objects = memory_objects(Clocked)
    ours, digests = contents(objects, tmp_path), {adapter(1).digest}
    put(ours, adapter(1))
    # When it was looked at, and whether something referred to it then.
    for objects.clock, used in ((100, True), (200, False), (250, False), (290, True), (300, False)):
        assert ours.collect(lambda used=used: digests if used else set(), age=60.0) == 0
    objects.clock = 359
    assert ours.collect(set, age=60.0) == 0
    objects.clock = 360
    assert ours.collect(set, age=60.0) == 1


def test_what_is_referred_to_between_two_looks_stays(tmp_path: Path) -> None:
    ours = contents(memory_objects(), tmp_path)
    put(ours, adapter(1))
    answers = iter([set(), set(), {adapter(1).digest}])
    assert ours.collect(lambda: next(answers), age=0.0) == 0
    assert ours.collect(lambda: next(answers), age=0.0) == 0
    assert next(answers, None) is None


def test_what_is_written_again_between_two_looks_stays(tmp_path: Path) -> None:
    """It is being registered, and the change is still to come."""
    objects = memory_objects(Clocked)
    ours = contents(objects, tmp_path)
    put(ours, adapter(1))
    ours.collect(set, age=60.0)
    objects.clock = 100

    def put_meanwhile() -> set[str]:
        put(ours, adapter(1))
        return set()

    assert ours.collect(put_meanwhile, age=60.0) == 0
    objects.clock = 160
    assert ours.collect(set, age=60.0) == 1


def test_what_was_collected_before_its_change_was_made_is_written_again(tmp_path: Path) -> None:
    """The other server looked before the change, and removed it after the content was put."""
    objects = memory_objects()
    ours, given = contents(objects, tmp_path), adapter(1)
    files = {CONFIG: given.config, WEIGHTS: given.weights}
    with ours.put(given.digest, files):
        objects.remove(f"blobs/{given.digest}/{WEIGHTS}")
        ours.confirm(given.digest, files)
    assert objects.sizes(f"blobs/{given.digest}") == {n: len(d) for n, d in files.items()}


def test_only_digests_are_looked_for(tmp_path: Path) -> None:
    ours = contents(memory_objects(), tmp_path)
    for name in ("", "../log", "A" * 64, "a" * 63):
        assert ours.look(name) is Health.MISSING
