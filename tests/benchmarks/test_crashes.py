"""The measurements of kill -9 and of a full disk: a few rounds of each, and that they can fail."""

from __future__ import annotations

import os
import random
from pathlib import Path

from benchmarks import crashes, full_disk
from benchmarks.crash_model import NAMES, Model, Step, apply, random_step


def test_the_model_changes_as_the_registry_does(tmp_path: Path) -> None:
    rng, model = random.Random(3), Model()
    with crashes.opened(tmp_path) as registry:
        for _ in range(60):
            step = random_step(rng, model)
            apply(registry, step)
            model = model.after(step)
            assert Model.of(registry) == model
    assert crashes.look(tmp_path) == (model, [])


def test_a_few_kills_lose_nothing(tmp_path: Path) -> None:
    result = crashes.of_registry(tmp_path / "state", 4, seed=1)
    assert (result["cycles"], result["wrong"]) == (4, 0), result["what"]


def test_a_lost_change_and_a_damaged_content_are_seen(tmp_path: Path) -> None:
    with crashes.opened(tmp_path) as registry:
        for name, seed in zip(NAMES[:2], (0, 1), strict=True):
            apply(registry, Step("register", name, seed))
        model, digest = Model.of(registry), registry.get("default", NAMES[0]).digest
    weights = tmp_path / "blobs" / digest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    os.unlink(tmp_path / "log" / f"{2:020d}.json")
    found, complaints = crashes.look(tmp_path)
    assert list(model.difference(found)) == [NAMES[1]]
    assert any("damaged" in text for text in complaints)


def test_a_disk_with_room_refuses_nothing(tmp_path: Path) -> None:
    """The rounds of the full disk, on one whose ballast leaves all of it."""

    class Nothing(full_disk.Ballast):
        def fill(self, left: int) -> None:
            pass

    result = full_disk.measure(tmp_path, Nothing(tmp_path), 3, seed=0)
    assert (result["wrong"], result["refused"]) == (0, 0), result["what"]
    assert result["made"] == 3 * full_disk.STEPS
