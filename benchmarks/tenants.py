"""Two tenants hammered together: does anything of one reach the other?

A real server with keys, on the demo's base. Both tenants have adapters of their own under the same
names with other contents, and under names of their own; the bundle's are shared. Randomised calls
of both run at the same time: explicit mixtures, tasks and routed prompts, with names that are the
tenant's, shared, the other's or nobody's; ListAdapters, GetAdapter, Route, GetRouter,
GetServerInfo. Both send the same prompts. Every answer is checked: its adapters, candidates, names
and counts are those that the tenant may use; a name of the other is answered like one that nobody
has; a prompt that only the other has sent finds nothing in the prefix cache; the tokens are the
same whoever asks, and, of a sample, those of the same mixture alone afterwards.

    python -m benchmarks.tenants [--requests 10000] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks import report
from benchmarks.keys import add_key
from mora_serve.client import AsyncClient, Client
from mora_serve.core import SHARED_TENANT, Decision
from mora_serve.demo.bundle import bundle_path
from mora_serve.demo.process import ServerProcess
from mora_serve.errors import MoraError, NotFound

SHARED_NAMES = ("reverse", "uppercase", "json", "polite")
COMMON = ("helper", "writer")  # names that both tenants have, with other contents
TOKENS, PARALLEL, PROMPTS, ALONE, SECONDS = 6, 48, 1500, 200, 60.0
NOBODY = "nobodys-name"

Mixed = tuple[tuple[str, float], ...]  # digests and weights


@dataclass
class Tenant:
    """One tenant, its client, and what it may use: name -> digest."""

    name: str
    client: AsyncClient
    own: dict[str, str] = field(default_factory=dict)
    usable: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1500.0, help="at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(Path(folder), args.requests, args.seconds, args.seed))
    for line in result["leaks"][:20]:
        report.log(line)
    report.log(f"{result['requests']} calls {result['kinds']}: {len(result['leaks'])} leaks")
    report.emit({**result, "leaks": len(result["leaks"]), "environment": report.environment()})


async def measure(folder: Path, requests: int, seconds: float, seed: int) -> dict[str, Any]:
    """Set both tenants up, ask everything alone, then all at once."""
    file, names = folder / "access.toml", ("acme", "globex")
    secrets = {name: add_key(file, name, name) for name in names}
    flags = {"access.file": file, "access.audit": folder / "audit", "server.log_calls": False}
    with ServerProcess(flags) as server:
        with Client(server.address) as client:
            server.wait_until_ready(client)  # the loop has nothing else to do
        first, second = (
            AsyncClient(server.address, timeout=SECONDS, api_key=secrets[n]) for n in names
        )
        async with first, second:
            tenants = [Tenant(n, c) for n, c in zip(names, (first, second), strict=True)]
            for tenant in tenants:
                await set_up(tenant, folder)
            return await hammer(tenants, requests, seconds, random.Random(seed))


async def set_up(tenant: Tenant, folder: Path) -> None:
    """Upload the tenant's adapters: contents of its own."""
    for i, name in enumerate((*COMMON, *(f"{tenant.name}-{i}" for i in range(3)))):
        source = bundle_path() / "adapters" / SHARED_NAMES[i % len(SHARED_NAMES)]
        directory = folder / tenant.name / name
        directory.mkdir(parents=True)
        for path in source.iterdir():
            if path.suffix != ".safetensors":
                (directory / path.name).write_bytes(path.read_bytes())
        factor = 0.9 + 0.33 * (tenant.name == "globex") + 0.05 * i
        tensors = load_file(source / "adapter_model.safetensors")
        save_file(
            {k: (v.astype(np.float32) * factor).astype(v.dtype) for k, v in tensors.items()},
            directory / "adapter_model.safetensors",
        )
        prompts = [f"{tenant.name} {name} please do {word}" for word in WORDS[:8]]
        adapter = await tenant.client.upload_adapter(
            name, directory, tasks=[f"task-{name}"], prompts=prompts
        )
        tenant.own[name] = adapter.digest
    tenant.usable = {a.name: a.digest for a in await tenant.client.list_adapters()}


WORDS = ("stone", "river", "cloud", "lamp", "grass", "fork", "violin", "harbour", "ember", "quill")


class Calls:
    """Randomised calls, each with the check of its answer."""

    def __init__(self, tenants: list[Tenant], rng: random.Random) -> None:
        self.tenants = tenants
        self.rng = rng
        self.leaks: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.answers: dict[tuple[str, Mixed], tuple[Tenant, tuple[int, ...]]] = {}

    def other(self, tenant: Tenant) -> Tenant:
        """The other one."""
        return next(t for t in self.tenants if t is not tenant)

    def leak(self, tenant: Tenant, what: str) -> None:
        """Note that something of another tenant's was seen."""
        self.leaks.append(f"{tenant.name}: {what}")

    async def one(self, tenant: Tenant) -> None:
        """Make one call and check its answer."""
        kind = self.rng.choices(
            ("mixture", "task", "auto", "foreign", "route", "get", "list", "info"),
            (30, 15, 15, 10, 10, 10, 5, 5),
        )[0]
        self.kinds[kind] += 1
        await getattr(self, kind)(tenant)

    async def mixture(self, tenant: Tenant) -> None:
        """Generate with adapters by name: the tokens are those of this tenant's contents."""
        names = self.rng.sample(sorted(tenant.usable), self.rng.choice((1, 1, 2)))
        await self.generate(tenant, adapters=dict.fromkeys(sorted(names), 1.0))

    async def task(self, tenant: Tenant) -> None:
        """Generate by a task that the tenant has."""
        await self.generate(tenant, task=f"task-{self.rng.choice(sorted(tenant.own))}")

    async def auto(self, tenant: Tenant) -> None:
        """Let the router pick, by a prompt that may be like the other tenant's examples."""
        await self.generate(tenant)

    async def generate(self, tenant: Tenant, **options: Any) -> None:
        """A short greedy answer, checked."""
        prompt = self.prompt()
        fresh = prompt not in tenant.asked
        tenant.asked.add(prompt)
        result = await tenant.client.generate(
            prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True, **options
        )
        self.check(tenant, result.decision)
        mixture = mixed(result.decision)
        tokens = tuple(t.id for t in result.tokens)
        whose, before = self.answers.setdefault((prompt, mixture), (tenant, tokens))
        if before != tokens:
            self.leak(tenant, f"other tokens than for {whose.name} before, for {prompt!r}")
        if fresh and result.usage.cached_tokens:
            self.leak(tenant, f"{result.usage.cached_tokens} tokens of a new prompt were cached")

    def prompt(self) -> str:
        """One of those that both tenants use; a third are like examples of one of them.

        Each begins in its own way, so that two share no page of the cache.
        """
        number = self.rng.randrange(PROMPTS)
        rng = random.Random(number)
        start = f"{number:05d} {' '.join(rng.sample(WORDS, 5))}"
        if number % 3:
            return f"{start}: say it again"
        like = rng.choice(self.tenants)
        return f"{start}: {like.name} {rng.choice(sorted(like.own))} please do it"

    async def alone(self) -> int:
        """Ask some of it again, one after another; how many answers were compared."""
        known = sorted(self.answers.items(), key=lambda item: item[0])
        chosen = self.rng.sample(known, min(ALONE, len(known)))
        for (prompt, mixture), (tenant, tokens) in chosen:
            names = {digest: name for name, digest in tenant.usable.items()}
            adapters = {names[digest]: weight for digest, weight in mixture}
            result = await tenant.client.generate(
                prompt,
                adapters=adapters or None,
                base=not adapters,
                max_tokens=TOKENS,
                temperature=0.0,
                ignore_eos=True,
            )
            if tuple(t.id for t in result.tokens) != tokens:
                self.leak(tenant, f"other tokens than alone, for {prompt!r}")
        return len(chosen)

    def check(self, tenant: Tenant, decision: Decision) -> None:
        """Everything that a decision names is what the tenant may use."""
        for adapter in decision.mixture.adapters:
            if tenant.usable.get(adapter.adapter) != adapter.digest:
                self.leak(tenant, f"ran {adapter.adapter} with digest {adapter.digest}")
        for candidate in decision.candidates:
            if candidate.adapter not in tenant.usable:
                self.leak(tenant, f"saw candidate {candidate.adapter}")

    async def foreign(self, tenant: Tenant) -> None:
        """Ask for what only the other has: the answer is that for what nobody has."""
        other = self.other(tenant)
        name = self.rng.choice([n for n in other.own if n not in COMMON])
        options: list[tuple[dict[str, Any], dict[str, Any]]] = [
            ({"adapters": {name: 1.0}}, {"adapters": {NOBODY: 1.0}}),
            ({"task": f"task-{name}"}, {"task": f"task-{NOBODY}"}),
            ({"candidates": [name]}, {"candidates": [NOBODY]}),
        ]
        theirs, nobodys = self.rng.choice(options)
        texts = []
        for chosen in (theirs, nobodys):
            try:
                result = await tenant.client.generate("x", max_tokens=1, **chosen)
            except NotFound as e:
                texts.append(e.message.replace(name, NOBODY))
            except MoraError as e:
                self.leak(tenant, f"{chosen} ended as {e.reason}")
            else:
                self.leak(tenant, f"{chosen} was answered by {result.decision.mixture}")
        # Which names are near depends on the name that was asked for; whose they are does not.
        for text in texts:
            for near in re.findall(r"[a-z0-9][a-z0-9._-]*-\d", text.split("did you mean")[-1]):
                if near.removeprefix("task-") not in tenant.usable and near != NOBODY:
                    self.leak(tenant, f"an error named {near}")

    async def route(self, tenant: Tenant) -> None:
        """A decision without an answer."""
        self.check(tenant, await tenant.client.route(self.prompt()))

    async def get(self, tenant: Tenant) -> None:
        """Describe an adapter: one that both have is the tenant's own."""
        name = self.rng.choice(sorted({*tenant.usable, *self.other(tenant).usable}))
        try:
            adapter = await tenant.client.get_adapter(name)
        except NotFound:
            if name in tenant.usable:
                self.leak(tenant, f"{name} was not found")
            return
        if tenant.usable.get(name) != adapter.digest:
            self.leak(tenant, f"{name} was described with digest {adapter.digest}")

    async def list(self, tenant: Tenant) -> None:
        """All adapters are the tenant's own and the shared ones."""
        found = {a.name: a.digest for a in await tenant.client.list_adapters()}
        if found != tenant.usable:
            self.leak(tenant, f"listed {sorted(found.items() ^ tenant.usable.items())}")

    async def info(self, tenant: Tenant) -> None:
        """Counts are of what the tenant may use."""
        info, router = await tenant.client.server_info(), await tenant.client.get_router()
        if (info.adapters, router.routable_adapters) != (len(tenant.usable),) * 2:
            self.leak(tenant, f"counted {info.adapters} and {router.routable_adapters}")


def mixed(decision: Decision) -> Mixed:
    """The contents and weights of a decision."""
    return tuple(sorted((a.digest, a.weight) for a in decision.mixture.adapters))


async def hammer(
    tenants: list[Tenant], requests: int, seconds: float, rng: random.Random
) -> dict[str, Any]:
    """So many calls of both at once, ``PARALLEL`` at a time; fewer where time runs out."""
    calls = Calls(tenants, rng)
    digests = [set(t.own.values()) for t in tenants]
    if digests[0] & digests[1] or any(set(COMMON) - t.usable.keys() for t in tenants):
        raise RuntimeError(f"the tenants' adapters are not set up as {SHARED_TENANT} and own")
    end, left = time.monotonic() + seconds, itertools.count()

    async def worker() -> None:
        while next(left) < requests and time.monotonic() < end:
            await calls.one(rng.choice(tenants))

    start = time.monotonic()
    await asyncio.gather(*(worker() for _ in range(PARALLEL)))
    took = time.monotonic() - start
    return {
        "requests": sum(calls.kinds.values()),
        "kinds": dict(calls.kinds),
        "answers": len(calls.answers),
        "asked_alone": await calls.alone(),
        "seconds": took,
        "leaks": calls.leaks,
    }


if __name__ == "__main__":
    main()
