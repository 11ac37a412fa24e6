"""Thousands of adapters: each its own, each servable."""

from __future__ import annotations

from benchmarks import many_adapters, memory
from mora_serve.adapters.registry import Registry
from mora_serve.adapters.validate import read_directory
from mora_serve.config import AdaptersConfig
from mora_serve.core import DEFAULT_TENANT
from mora_serve.model.shape import shape_from_config

SHAPE = shape_from_config(memory.llama_config(256, 512, 2, 320))


def test_every_adapter_has_a_digest_of_its_own_and_is_registered(tmp_path):
    size = many_adapters.register(tmp_path, SHAPE, 7, AdaptersConfig())
    with Registry(tmp_path, AdaptersConfig(), SHAPE) as registry:
        records = registry.list(DEFAULT_TENANT)
    assert [r.name for r in records] == list(many_adapters.names(7))
    assert len({r.digest for r in records}) == 7
    assert [r.rank for r in records] == [8, 8, 4] * 2 + [8]
    assert sum(r.nbytes for r in records) == size


def test_written_adapters_are_those_of_their_seed(tmp_path):
    template = many_adapters.Template(SHAPE, 4, ("q_proj",))
    for name, seed in (("one", 1), ("two", 2), ("again", 1)):
        template.write(tmp_path / name, seed)
    limits = AdaptersConfig()
    one, two, again = (
        read_directory(tmp_path, name, SHAPE, limits) for name in ("one", "two", "again")
    )
    assert one.digest == again.digest != two.digest
    assert one.targets == ("q_proj",)
