"""The bundle that ships: what is registered from it, and that it is small enough."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mora_serve.adapters.registry import Registry
from mora_serve.adapters.validate import read_directory
from mora_serve.config import AdaptersConfig
from mora_serve.core import DEFAULT_TENANT
from mora_serve.demo.bundle import bundle_path, read_examples, register_bundle
from mora_serve.errors import InvalidArgument
from mora_serve.model.shape import ModelShape, shape_from_config

LIMITS = AdaptersConfig()


@pytest.fixture
def shape() -> ModelShape:
    return shape_from_config(json.loads((bundle_path() / "base" / "config.json").read_text()))


def listed(registry: Registry) -> list[tuple[str, int, str]]:
    return [(r.name, r.version, r.digest) for r in registry.list(DEFAULT_TENANT)]


def test_registering_again_changes_nothing(tmp_path: Path, shape: ModelShape) -> None:
    registry = Registry(tmp_path, LIMITS, shape)
    register_bundle(registry, shape, LIMITS)
    before, router, revision = listed(registry), registry.router(), registry.revision
    assert len(before) >= 8
    assert router
    registry.close()
    again = Registry(tmp_path, LIMITS, shape)
    register_bundle(again, shape, LIMITS)
    assert (listed(again), again.router(), again.revision) == (before, router, revision)
    again.close()


def test_an_adapter_put_in_place_of_a_bundled_one_stays(shape: ModelShape) -> None:
    registry = Registry(None, LIMITS, shape)
    mine = read_directory(bundle_path(), "adapters/spell", shape, LIMITS)
    registry.register(DEFAULT_TENANT, "reverse", mine)
    registry.set_router({"router.safetensors": b"mine"})
    register_bundle(registry, shape, LIMITS)
    assert registry.get(DEFAULT_TENANT, "reverse").digest == mine.digest
    assert registry.router() == {"router.safetensors": b"mine"}
    assert registry.get(DEFAULT_TENANT, "uppercase").digest != mine.digest
    registry.close()


def test_what_is_kept_out_of_the_registry_can_be_registered_later(shape: ModelShape) -> None:
    registry = Registry(None, LIMITS, shape)
    register_bundle(registry, shape, LIMITS)
    names = {name for name, _, _ in listed(registry)}
    late = [e for e in read_examples(bundle_path()) if e.kind == "late"]
    assert late
    for example in late:
        assert example.adapter not in names
        directory = f"adapters/{example.adapter}"
        assert read_directory(bundle_path(), directory, shape, LIMITS).card
    registry.close()


def test_limits_too_small_for_the_bundle_are_an_error_that_names_them(shape: ModelShape) -> None:
    limits = AdaptersConfig(max_rank=1)
    registry = Registry(None, limits, shape)
    with pytest.raises(InvalidArgument, match="max_rank"):
        register_bundle(registry, shape, limits)
    registry.close()


def test_every_routed_example_names_a_registered_adapter_and_an_answer(shape: ModelShape) -> None:
    registry = Registry(None, LIMITS, shape)
    register_bundle(registry, shape, LIMITS)
    names = {name for name, _, _ in listed(registry)}
    for example in read_examples(bundle_path()):
        if example.kind in ("auto", "task", "chat"):
            asked = set(example.mixture or (example.adapter,))
            assert asked <= names
            assert example.answer
    registry.close()


def test_what_is_damaged_is_replaced_by_what_ships(tmp_path: Path, shape: ModelShape) -> None:
    """An adapter and the router, with no new version; another content of the name stays damaged."""
    with Registry(tmp_path, LIMITS, shape) as registry:
        register_bundle(registry, shape, LIMITS)
        before, router = listed(registry), registry.router()
        mine = read_directory(bundle_path(), "adapters/spell", shape, LIMITS)
        registry.register(DEFAULT_TENANT, "mine", mine)
        registry.register(DEFAULT_TENANT, "uppercase", mine, replace=True)
        digests = {name: digest for name, _, digest in listed(registry)}
        router_digest = registry.set_router(router or {})
    for digest in (digests["reverse"], digests["mine"], router_digest):
        for file in (tmp_path / "blobs" / digest).iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    with Registry(tmp_path, LIMITS, shape) as registry:
        assert registry.router() is None
        register_bundle(registry, shape, LIMITS)
        assert registry.router() == router
        kept = [entry for entry in listed(registry) if entry[0] not in ("uppercase", "mine")]
        assert kept == [entry for entry in before if entry[0] != "uppercase"]
        served = {r.name for r in registry.served(DEFAULT_TENANT)}
        assert "reverse" in served
        assert ("spell" in served) == ("mine" in served)


def test_a_disk_that_takes_nothing_does_not_stop_the_start(
    shape: ModelShape, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry(None, LIMITS, shape) as registry:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "link", full)
        register_bundle(registry, shape, LIMITS)
        assert registry.all() == ()
    assert "bundle: reverse is left out: server.state: the disk is full" in caplog.text
