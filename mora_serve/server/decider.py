"""From a message's selection to a decision, off the event loop, its adapters held and here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager, contextmanager

from mora_serve.adapters.registry import Registry
from mora_serve.config import AdaptersConfig
from mora_serve.core import Decision, Mixture
from mora_serve.errors import MoraError, NotFound
from mora_serve.messages import mixture_of
from mora_serve.metrics import Metrics
from mora_serve.router.selection import AutoRoute, BaseOnly, Selection, Selector, TaskHint
from mora_serve.router.states import Asked, State
from mora_serve.server import call as calls
from mora_serve.server.convert import invalid
from mora_serve.server.fetching import Fetcher
from mora_serve.server.gate import Places
from mora_serve.server.prompts import Prompts
from mora_serve.v1 import generation_pb2 as pb

MAX_DECISIONS = 1024  # at the same time, those that wait for a thread or for the base included
_ATTEMPTS = 3  # an adapter may be replaced between its choice and its being held


class Decider:
    """Decides the mixtures of calls.

    ``executor`` runs the deciding. ``fetcher`` brings contents here, for an engine that is here.
    """

    def __init__(
        self,
        selector: Selector,
        registry: Registry,
        prompts: Prompts,
        metrics: Metrics,
        limits: AdaptersConfig,
        executor: Executor,
        fetcher: Fetcher | None,
    ) -> None:
        self._selector = selector
        self._registry = registry
        self._prompts = prompts
        self._metrics = metrics
        self._limits = limits
        self._executor = executor
        self._fetcher = fetcher
        self._places = Places(MAX_DECISIONS, "decisions")

    @asynccontextmanager
    async def decided(self, selection: pb.Selection, prompt: pb.Prompt) -> AsyncIterator[Decision]:
        """The decision for a checked prompt, its versions readable inside the context.

        Raises what ``selection_of``, ``Selector.ask``, ``Selector.decide`` and ``Fetcher.fetch``
        raise, and ResourceExhausted when too many wait to be decided.
        """
        tenant = calls.current().tenant
        chosen = selection_of(selection, self._limits)
        if chosen in (BaseOnly(), Mixture()):
            decision = self._decide(tenant, chosen, prompt)
            yield decision
            return
        with self._places.taken(tenant):
            decision = await self._decide_off_loop(tenant, chosen, prompt)
        try:
            if self._fetcher is not None:
                await self._fetcher.fetch(digests(decision))
            yield decision
        finally:
            self._executor.submit(self._release, digests(decision))

    async def _decide_off_loop(self, tenant: str, chosen: Selection, prompt: pb.Prompt) -> Decision:
        state = None
        if self._selector.asks_the_base and isinstance(chosen, TaskHint | AutoRoute):
            state = await self._state(tenant, chosen, prompt)
        future = self._executor.submit(self._decide_and_hold, tenant, chosen, prompt, state)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._release_late)
            raise

    async def _state(self, tenant: str, selection: Selection, prompt: pb.Prompt) -> State | None:
        """The base's state of a prompt, if the router needs it; no thread waits for the engine."""
        start = time.monotonic()

        def ask() -> Asked | None:
            with _in_selection():
                return self._selector.ask(tenant, selection, self._text(selection, prompt))

        asked = await asyncio.get_running_loop().run_in_executor(self._executor, ask)
        if asked is None:
            return None
        pooled = await asyncio.wrap_future(asked.states)
        self._metrics.pooled(time.monotonic() - start)
        return State(asked.text, asked.hidden, pooled[0])

    def _text(self, selection: Selection, prompt: pb.Prompt) -> str:
        return self._prompts.text(prompt) if isinstance(selection, TaskHint | AutoRoute) else ""

    def _decide(
        self, tenant: str, selection: Selection, prompt: pb.Prompt, state: State | None = None
    ) -> Decision:
        start = time.monotonic()
        text = self._text(selection, prompt) if state is None else state.text
        with _in_selection():
            decision = self._selector.decide(tenant, selection, text, state)
        self._metrics.decided(decision, time.monotonic() - start)
        return decision

    def _decide_and_hold(
        self, tenant: str, selection: Selection, prompt: pb.Prompt, state: State | None
    ) -> Decision:
        for attempt in range(_ATTEMPTS):
            decision = self._decide(tenant, selection, prompt, state)
            held: list[str] = []
            try:
                for digest in digests(decision):
                    self._registry.retain(digest)
                    held.append(digest)
            except NotFound:
                self._release(held)
                if attempt == _ATTEMPTS - 1:
                    raise
                self._registry.refresh()  # another process may have removed it
            else:
                break
        return decision

    def _release_late(self, future: Future[Decision]) -> None:
        """The client left while the decision was made."""
        if not future.cancelled() and future.exception() is None:
            self._release(digests(future.result()))

    def _release(self, held: Iterable[str]) -> None:
        for digest in held:
            self._registry.release(digest)


@contextmanager
def _in_selection() -> Iterator[None]:
    """The selector's fields lie in the request's selection."""
    try:
        yield
    except MoraError as e:
        raise (e.at(f"selection.{e.field}") if e.field else e) from None


def digests(decision: Decision) -> list[str]:
    """The contents of a decision's adapters."""
    return [a.digest for a in decision.mixture.adapters]


def selection_of(message: pb.Selection, limits: AdaptersConfig) -> Selection:
    """The selection of a message; the selector checks it. Unset: the router picks.

    Raises InvalidArgument for more names than a selection can have, before they are read.
    """
    kind = message.WhichOneof("kind")
    if kind == "task":
        _check_count("task.tasks", len(message.task.tasks), limits.max_mixture, "max_mixture")
        return TaskHint(tuple(message.task.tasks), message.task.fallback_to_router)
    if kind == "mixture":
        count = len(message.mixture.adapters)
        _check_count("mixture.adapters", count, limits.max_mixture, "max_mixture")
        return mixture_of(message.mixture)
    if kind == "base":
        return BaseOnly()
    auto = message.auto
    count = len(auto.candidates)
    _check_count("auto.candidates", count, limits.max_adapters, "max_adapters")
    return AutoRoute(auto.text, tuple(auto.candidates), auto.max_adapters)


def _check_count(field: str, count: int, most: int, key: str) -> None:
    if count > most:
        raise invalid(
            f"selection.{field}", f"{count} are more than adapters.{key} ({most}); name fewer"
        )
