"""The calls of ``soak``: of every kind, each with the ends that are right for it."""

from __future__ import annotations

import random
import time
from asyncio import TaskGroup
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mora_serve.client import AsyncClient
from mora_serve.demo.bundle import bundle_path, read_examples
from mora_serve.errors import MoraError
from mora_serve.v1 import generation_pb2 as pb

PATHS = ("reverse", "uppercase", "caesar", "double", "roman")
CHURNED = 6  # names whose adapters come and go, a tenant
FULL = "RESOURCE_EXHAUSTED"  # a refusal under load is right for any call


@dataclass(frozen=True)
class Kind:
    """One kind of call, and the ends that are right for it."""

    call: Callable[[AsyncClient], Awaitable[str]]
    right: frozenset[str]

    @property
    def name(self) -> str:
        """What figures call it."""
        return self.call.__name__.strip("_")


class Traffic:
    """Workers against one server, and what came of their calls."""

    def __init__(self, address: str, keys: Iterable[str], directory: Path, seed: int) -> None:
        self.ends: Counter[tuple[str, str]] = Counter()  # by kind and end
        self._clients = [AsyncClient(address, api_key=key, timeout=60.0) for key in keys]
        self._directory = directory
        self._rng = random.Random(seed)
        self._prompts = [e.prompt for e in read_examples(bundle_path()) if e.prompt]
        # Another worker may have the name: removed, replaced by other content, or pinned.
        raced = {"OK", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"}
        self._kinds = [
            Kind(call, frozenset(right))
            for call, right in (
                (self._generate, {"OK"}),
                (self._stream, {"OK"}),
                (self._route, {"OK"}),
                (self._tasks, {"OK"}),
                (self._leave, {"OK"}),
                (self._hurried, {"OK", "DEADLINE_EXCEEDED"}),
                (self._wrong, {"INVALID_ARGUMENT", "NOT_FOUND"}),
                (self._churn, raced),
                # An early refusal, such as ALREADY_EXISTS, may be lost in grpc's asyncio client.
                (self._upload, raced | {"ENDED_EARLY"}),
                (self._use, {"OK", "NOT_FOUND"}),
            )
        ]

    async def run(self, seconds: float, workers: int) -> None:
        """Call for so long, so many at a time."""
        end = time.monotonic() + seconds

        async def work() -> None:
            while time.monotonic() < end:
                await self._count(self._rng.choice(self._kinds))

        async with TaskGroup() as tasks:
            for _ in range(workers):
                tasks.create_task(work())

    async def tidy(self) -> None:
        """Remove what the workers have registered."""
        for client in self._clients:
            for adapter in await client.list_adapters():
                if adapter.name.startswith("churn-"):
                    await client.unregister_adapter(adapter.name)

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.close()

    async def _count(self, kind: Kind) -> None:
        try:
            end = await kind.call(self._rng.choice(self._clients))
        except MoraError as e:
            end = e.reason if e.reason == "ENDED_EARLY" else e.code
        except Exception as e:  # of the client itself
            end = type(e).__name__
        self.ends[kind.name, end] += 1

    @property
    def unexpected(self) -> dict[str, int]:
        """Ends that are not right for their calls; a refusal under load may be one's."""
        right = {kind.name: kind.right | {FULL} for kind in self._kinds}
        return {f"{n}: {end}": c for (n, end), c in self.ends.items() if end not in right[n]}

    @property
    def ok_share(self) -> float:
        """Of the calls that should succeed, the part that did."""
        sure = {kind.name for kind in self._kinds if kind.right == {"OK"}}
        calls = Counter(
            end for (name, end), c in self.ends.items() if name in sure for _ in range(c)
        )
        return calls["OK"] / max(1, calls.total())

    def _prompt(self) -> str:
        return f"{self._rng.randrange(1000)} {self._rng.choice(self._prompts)}"

    def _name(self) -> str:
        return f"churn-{self._rng.randrange(CHURNED)}"

    async def _generate(self, client: AsyncClient) -> str:
        await client.generate(self._prompt(), base=True, max_tokens=self._rng.randint(1, 48))
        return "OK"

    async def _stream(self, client: AsyncClient) -> str:
        tokens = self._rng.randint(1, 64)
        count = 0
        async with await client.stream(
            self._prompt(), base=True, max_tokens=tokens, ignore_eos=True
        ) as deltas:
            async for delta in deltas:
                count += len(delta.tokens)
        return "OK" if count == tokens else f"{count - tokens} tokens too many"

    async def _route(self, client: AsyncClient) -> str:
        await client.route(self._prompt())
        return "OK"

    async def _tasks(self, client: AsyncClient) -> str:
        await client.generate(
            self._prompt(), task="reverse", fallback_to_router=True, max_tokens=16
        )
        return "OK"

    async def _leave(self, client: AsyncClient) -> str:
        async with await client.stream(self._prompt(), max_tokens=200, ignore_eos=True) as deltas:
            async for _ in deltas:
                if self._rng.random() < 0.2:
                    break
        return "OK"

    async def _hurried(self, client: AsyncClient) -> str:
        timeout = self._rng.choice((0.001, 0.01, 0.05))
        await client.generate(self._prompt(), max_tokens=200, ignore_eos=True, timeout=timeout)
        return "OK"

    async def _wrong(self, client: AsyncClient) -> str:
        requests = (
            pb.GenerateRequest(),
            pb.GenerateRequest(prompt=pb.Prompt(text="x"), sampling=pb.SamplingParams(top_p=7)),
            pb.GenerateRequest(prompt=pb.Prompt(text="x" * 100_000)),
            pb.GenerateRequest(
                prompt=pb.Prompt(text="x"),
                selection=pb.Selection(task=pb.TaskHint(tasks=["no-such-task"])),
            ),
            pb.GenerateRequest(
                prompt=pb.Prompt(text="x"),
                selection=pb.Selection(
                    mixture=pb.Mixture(adapters=[pb.AdapterWeight(adapter="../etc")])
                ),
            ),
        )
        await client._run(client.generation.Generate, self._rng.choice(requests), {})
        return "OK"

    async def _churn(self, client: AsyncClient) -> str:
        name, what = self._name(), self._rng.random()
        if what < 0.6:
            replace = self._rng.random() < 0.7
            await client.register_adapter(
                name,
                self._rng.choice(PATHS),
                replace=replace,
                tasks=["churn"],
                prompts=["churn it"],
            )
        elif what < 0.8:
            await client.unregister_adapter(name)
        elif what < 0.9:
            await client.update_adapter(name, tasks=["churn"], prompts=[self._prompt()[:60]])
        else:
            await client.pin_adapter(name, True)
            await client.pin_adapter(name, False)
        return "OK"

    async def _upload(self, client: AsyncClient) -> str:
        directory = self._directory / self._rng.choice(PATHS)
        await client.upload_adapter(
            self._name(), directory, replace=self._rng.random() < 0.7, prompts=["churn it"]
        )
        return "OK"

    async def _use(self, client: AsyncClient) -> str:
        names = {self._name(): 1.0, self._name(): 0.5}
        await client.generate(self._prompt(), adapters=names, max_tokens=16)
        return "OK"
