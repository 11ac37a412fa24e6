"""One small base with every kind of PEFT adapter, made once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from benchmarks import families, oracle
from benchmarks.local import LocalEngine
from mora_serve.config import AdaptersConfig, BaseConfig, Config, EngineConfig
from mora_serve.engine import integrity


@pytest.fixture(scope="session")
def model_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    model = families.make_base("llama3", root / "base")
    oracle.make_adapters(copy.deepcopy(model), root / "adapters")
    return root


@pytest.fixture(params=["auto", "torch"])
def make_engine(model_root, request):
    """Engines over the shared base, stopped at the end of the test; on either of a CPU's paths.

    Their books are looked at then, unless the test spoils them (check=False), or its module's tests
    hold slots on their own account (HOLDS_SLOTS).
    """
    made, checked = [], []

    def make(
        slots: int = 6,
        names=tuple(oracle.VARIANTS),
        host_bytes: int = 1 << 20,
        check: bool = True,
        **limits,
    ) -> LocalEngine:
        config = Config(
            BaseConfig(str(model_root / "base"), quantization="none", dtype="fp32", device="cpu"),
            EngineConfig(**{"kernels": request.param, **limits}),
            AdaptersConfig(slots=slots, host_bytes=host_bytes),
        )
        engine = LocalEngine(config)
        for name in names:
            engine.register(name, model_root / "adapters", name)
        made.append(engine)
        if check and not getattr(request.module, "HOLDS_SLOTS", False):
            checked.append(engine.engine)
        return engine

    yield make
    for engine in made:
        engine.engine.stop()
    for engine in checked:
        integrity.check(engine._sequences.values(), engine.cache, engine.scheduler, engine.pool)
