"""An engine in this process, driven step by step: what measurements and tests look inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_serve.adapters.validate import ValidatedAdapter, read_directory
from mora_serve.config import Config
from mora_serve.core import AdapterLoad, AdapterWeight, Event, Mixture, Request, SamplingParams
from mora_serve.engine.engine import Engine
from mora_serve.engine.team import load_ranks
from mora_serve.errors import NotFound
from mora_serve.model.loading import Base

Job = tuple[Sequence[int], Mapping[str, float], SamplingParams]


class LocalEngine:
    """The real engine over real adapter files, without its thread, the registry or gRPC."""

    def __init__(self, config: Config, base: Base | None = None) -> None:
        """``base`` in place of the one that the configuration names."""
        self.config = config
        self.base, self.team = load_ranks(config) if base is None else (base, None)
        self.adapters: dict[str, ValidatedAdapter] = {}
        self.digests: dict[str, str] = {}
        self.open_hook: Callable[[str], object] = lambda digest: None  # told of each reading
        try:
            self.engine = Engine(self.base, config, self._open, self.team)
        except BaseException:
            if self.team is not None:
                self.team.close()
            raise
        self.steps: list[Sequence[Event | AdapterLoad]] = []
        self._count = 0

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.engine.stop()

    def register(self, name: str, root: Path, path: str) -> None:
        """Make the PEFT directory ``path`` under ``root`` usable as ``name``."""
        self.add(name, read_directory(root, path, self.base.shape, self.config.adapters))

    def add(self, name: str, adapter: ValidatedAdapter) -> None:
        """Make an adapter usable as ``name``."""
        self.adapters[adapter.digest] = adapter
        self.digests[name] = adapter.digest

    def make_resident(self, names: Sequence[str]) -> None:
        """Bring adapters into slots and keep them there."""
        digests = tuple(self.digests[n] for n in names)
        while not self.engine.pool.hold(digests):
            time.sleep(0.01)
            for load in self.engine.pool.poll():
                if load.error is not None:
                    raise load.error.error()

    def request(self, job: Job, tenant: str = "default") -> Request:
        """A request with a fresh id and a resolved mixture."""
        prompt, mixture, sampling = job
        self._count += 1
        weights = tuple(AdapterWeight(n, w, self.digests[n]) for n, w in mixture.items())
        arrival = time.monotonic()
        return Request(
            f"r{self._count}", tuple(prompt), sampling, Mixture(weights), tenant, arrival
        )

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Run all jobs in one batch; the generated token ids of each."""
        requests = [self.request(job) for job in jobs]
        for request in requests:
            self.engine.submit(request)
        tokens: dict[str, list[int]] = {r.id: [] for r in requests}
        left = set(tokens)
        while left:
            for event in self.step():
                if isinstance(event, Event):
                    tokens[event.request_id] += [t.id for t in event.tokens]
                    if event.error is not None:
                        raise event.error.error()
                    if event.finish is not None:
                        left.discard(event.request_id)
        return [tokens[r.id] for r in requests]

    def step(self) -> Sequence[Event | AdapterLoad]:
        """One step of the engine; its events are also kept in ``steps``."""
        events = self.engine.step()
        if not events:
            time.sleep(0.001)
        self.steps.append(events)
        return events

    def _open(self, digest: str) -> ValidatedAdapter:
        self.open_hook(digest)
        if digest not in self.adapters:
            raise NotFound(f"adapter: no content {digest[:12]}", field="adapter")
        return self.adapters[digest]
