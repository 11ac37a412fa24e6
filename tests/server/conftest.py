"""A real server in this process, on a small random base, with adapters to register."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import families
from mora_serve.client import Client
from mora_serve.config import Config, load_config
from mora_serve.model.shape import PROJECTIONS, ModelShape, shape_from_config
from mora_serve.server.app import MoraServer
from tests.adapters import make

CONTEXT, LONGEST = 2048, 2000
# An answer that outlasts whatever a test does beside it: half a second and more.
OUTLASTING = {"max_tokens": LONGEST, "ignore_eos": True}
PROMPTS = {
    "rev": [f"reverse the word {w}" for w in ("stone", "river", "cloud", "lamp", "grass", "fork")],
    "sum": [f"add the numbers {i} and {i + 3}" for i in range(6)],
}


@dataclasses.dataclass(frozen=True)
class Running:
    """A server on a thread and event loop of its own."""

    server: MoraServer
    loop: asyncio.AbstractEventLoop
    end: Callable[[], None]

    def run(self, work: Any) -> Any:
        """Run a coroutine on the server's loop; its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def client(self, tenant: str = "") -> Client:
        """A client of this server."""
        return Client(self.server.address, tenant=tenant, timeout=120)


@contextlib.contextmanager
def running(config: Config) -> Iterator[Running]:
    """Serve inside the context; what the server raises is raised here."""
    started = threading.Event()
    box: dict[str, Any] = {}

    async def serve() -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        try:
            async with MoraServer(config) as server:
                end = lambda: loop.call_soon_threadsafe(stopping.set)  # noqa: E731
                box["running"] = Running(server, loop, end)
                started.set()
                await stopping.wait()
        except BaseException as e:
            box["error"] = e
        finally:
            started.set()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    started.wait()
    try:
        if "running" in box:
            yield box["running"]
    finally:
        if "running" in box:
            box["running"].end()
        thread.join()
        if "error" in box:
            raise box["error"]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and adapters/: rev and sum with routing cards, plain without, and bad ones."""
    root = tmp_path_factory.mktemp("server")
    families.make_base("llama3", root / "base", max_position_embeddings=CONTEXT)
    for seed, name in enumerate(("rev", "sum", "plain")):
        path = write_adapter(root / "adapters" / name, seed, root / "base")
        if name in PROMPTS:
            card = {"tasks": [f"do-{name}"], "prompts": PROMPTS[name]}
            (path / "routing_card.json").write_text(json.dumps(card))
    return root


def write_adapter(path: Path, seed: int, base: Path | None = None, rank: int = 4) -> Path:
    """A PEFT directory for the base beside it."""
    config = json.loads(((base or path.parent / "base") / "config.json").read_text())
    shape = shape_from_config(config)
    return make.directory(path, make.config(rank), tensors(shape, seed, rank))


def tensors(shape: ModelShape, seed: int, rank: int = 4) -> dict[str, np.ndarray]:
    """An adapter of all projections, large enough to change what is sampled."""
    rng = np.random.default_rng(seed)
    out = {}
    for layer in range(shape.layers):
        for projection in PROJECTIONS:
            rows, columns = shape.projection(projection)
            a, b = rng.normal(size=(rank, columns)), rng.normal(size=(rows, rank))
            out[make.key(layer, projection, "A.weight")] = (a / 4).astype(np.float32)
            out[make.key(layer, projection, "B.weight")] = (b / 4).astype(np.float32)
    return out


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Return when it is true; fail when it is not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def configuration(root: Path, **sections: dict[str, Any]) -> Config:
    """Small limits, so that tests reach them; any key can be changed."""
    defaults: dict[str, dict[str, Any]] = {
        "base": {
            "model": str(root / "base"),
            "quantization": "none",
            "dtype": "fp32",
            "device": "cpu",
        },
        "engine": {"max_tokens": LONGEST, "max_batch": 16, "max_stop": 4},
        "adapters": {"root": str(root / "adapters"), "slots": 8},
        "server": {"port": 0, "metrics_port": 0, "drain_seconds": 30.0, "drain_wait_seconds": 0.0},
    }
    flags = {
        f"{section}.{key}": value
        for section in defaults | sections
        for key, value in (defaults.get(section, {}) | sections.get(section, {})).items()
    }
    return load_config(environ={}, flags=flags)


@contextlib.contextmanager
def running_with(config: Config, *adapters: str) -> Iterator[Running]:
    """Serve inside the context, these adapters registered under their directories' names."""
    with running(config) as serving:
        with serving.client() as client:
            for name in adapters:
                client.register_adapter(name, name)
        yield serving


@pytest.fixture(scope="session")
def serving(root: Path) -> Iterator[Running]:
    """One server for the tests that leave it as they found it."""
    with running(configuration(root)) as serving:
        yield serving


@pytest.fixture
def configure(root: Path) -> Callable[..., Config]:
    """Makes a configuration; any key can be changed."""
    return functools.partial(configuration, root)


@pytest.fixture
def client(serving: Running) -> Iterator[Client]:
    """A client of the shared server as a tenant of the test's own."""
    with serving.client(f"t{uuid.uuid4().hex}") as client:
        yield client
