"""The bundle that ships: what is registered from it, and that it is small enough."""

from __future__ import annotations

import json
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
