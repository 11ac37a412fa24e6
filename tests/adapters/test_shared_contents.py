"""Contents in a store of objects, and their cache."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

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
    ours.look(adapter(1).digest)
    ours.retain(adapter(1).digest)
    other.trim()
    put(other, adapter(2))
    assert adapter(1).digest in cached(tmp_path) or ours.look(adapter(1).digest) is Health.SOUND
    with ours.blobs.hold(adapter(1).digest) or pytest.fail("it is gone"):
        other.trim()
        assert adapter(1).digest in cached(tmp_path)
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
    assert ours.collect(kept, age=3600.0) == 0
    assert ours.collect(kept, age=0.0) == 1
    assert objects.folders("blobs") == [adapter(1).digest]
    assert ours.collect(kept, age=0.0) == 0


def test_what_is_referred_to_between_two_looks_stays(tmp_path: Path) -> None:
    ours = contents(memory_objects(), tmp_path)
    put(ours, adapter(1))
    answers = iter([set(), {adapter(1).digest}])
    assert ours.collect(lambda: next(answers), age=0.0) == 0


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
