"""What a registry should hold: random changes, made to it and to a plain model of it."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from benchmarks import tiny
from mora_serve.adapters.registry import Registry
from mora_serve.core import DEFAULT_TENANT

NAMES = tuple(f"a{i}" for i in range(6))
SEEDS = 8  # contents; each is in use under several names at times
RANK = 2


class Step(NamedTuple):
    """One change: of a kind, to a name, with a number that it is about."""

    kind: str
    name: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Model:
    """Names with (version, content's seed, pinned, task), and the router's number."""

    adapters: Mapping[str, tuple[int, int, bool, str]] = field(default_factory=dict)
    router: int | None = None

    @property
    def seeds(self) -> Mapping[str, int]:
        """The seeds of all contents by their digests."""
        return digests()

    def after(self, step: Step) -> Model:
        """The model with one change made."""
        adapters = dict(self.adapters)
        version, seed, pinned, task = adapters.get(step.name, (0, -1, False, ""))
        match step.kind:
            case "register":
                if seed != step.seed:
                    adapters[step.name] = version + 1, step.seed, pinned, f"t{step.seed}"
            case "unregister":
                del adapters[step.name]
            case "pin":
                adapters[step.name] = version, seed, bool(step.seed), task
            case "card":
                adapters[step.name] = version, seed, pinned, f"u{step.seed}"
            case "router":
                return replace(self, router=step.seed)
        return replace(self, adapters=adapters)

    @classmethod
    def of(cls, registry: Registry) -> Model:
        """What a registry holds."""
        adapters = {
            r.name: (r.version, digests()[r.digest], r.pinned, "".join(r.tasks))
            for r in registry.list(DEFAULT_TENANT)
        }
        router = registry.router()
        return cls(adapters, int(router["r"]) if router else None)

    def difference(self, found: Model) -> dict[str, Any]:
        """Where another model differs: what there should be, and what there is."""
        names = self.adapters.keys() | found.adapters.keys()
        pairs = {n: (self.adapters.get(n), found.adapters.get(n)) for n in sorted(names)}
        pairs["router"] = (self.router, found.router)  # type: ignore[assignment]
        return {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}


def random_step(rng: random.Random, model: Model) -> Step:
    """A change that can be made to a model."""
    name, seed = rng.choice(NAMES), rng.randrange(SEEDS)
    if name not in model.adapters or rng.random() < 0.4:
        return Step("register", name, seed)
    kind = rng.choice(("unregister", "unregister", "pin", "card", "router"))
    return Step(kind, name, seed % 2 if kind == "pin" else seed)


def apply(registry: Registry, step: Step) -> None:
    """Make a change to a registry. Raises what it raises."""
    match step.kind:
        case "register":
            tasks = [f"t{step.seed}"]
            content = tiny.adapter(step.seed, RANK)
            registry.register(DEFAULT_TENANT, step.name, content, tasks=tasks, replace=True)
        case "unregister":
            registry.unregister(DEFAULT_TENANT, step.name)
        case "pin":
            registry.pin(DEFAULT_TENANT, step.name, bool(step.seed))
        case "card":
            registry.update(DEFAULT_TENANT, step.name, tasks=[f"u{step.seed}"])
        case "router":
            registry.set_router({"r": str(step.seed).encode()})


@functools.cache
def digests() -> Mapping[str, int]:
    """The seeds of all contents by their digests."""
    return {tiny.adapter(seed, RANK).digest: seed for seed in range(SEEDS)}
