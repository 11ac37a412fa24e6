"""The engines of all replicas, as one engine for the gateway's server.

What crosses is what crosses between a server and its engine's thread: ``core``'s Request one way,
its Events the other, an error as a ``Failure``. A request whose replica is lost goes to another
one, which its caller does not notice (see ``resume``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, fields, replace
from typing import Protocol

from mora_serve.cluster.resume import Diverged, Sent
from mora_serve.config import Config
from mora_serve.core import AdapterLoad, EngineStats, Event, Finish, Request
from mora_serve.engine.pins import check_pins
from mora_serve.errors import Failure, Internal, MoraError, Unavailable
from mora_serve.model.shape import ModelShape
from mora_serve.model.tokenizer import Tokenizer
from mora_serve.router.arrays import Floats
from mora_serve.server.gate import Places

log = logging.getLogger(__name__)

PAUSE = 0.05  # seconds
ATTEMPTS = 4  # replicas that one request is given to, one after the other
REPORT_SECONDS = 1.0  # between two looks at the replicas
REPORT_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Description:
    """What a replica says of itself once; ``max_context`` in tokens, ``slots`` of adapters."""

    name: str
    fingerprint: str
    quantization: str
    dtype: str
    device: str
    max_context: int
    slots: int
    adapter_dtype: str


@dataclass(frozen=True)
class RemoteBase:
    """The base that the replicas run; see ``mora_serve.server.parts.BaseModel``."""

    name: str
    shape: ModelShape
    tokenizer: Tokenizer
    fingerprint: str
    quantization: str
    dtype: str
    device: str


class ReplicaLost(Exception):
    """The replica has died, or goes: another one may serve."""


class Replicas(Protocol):
    """How the replicas are called; each method raises MoraError besides what it says."""

    def stream(
        self, request: Request, left: float | None
    ) -> AsyncGenerator[Event | Failure | None, None]:
        """Give a request to one of them: None once it is admitted, then its events.

        A Failure ends it. ``left`` is the time to its deadline, in seconds. Raises ReplicaLost.
        """

    async def pool(
        self, texts: Sequence[str], depth: int, max_tokens: int, background: bool, tenant: str
    ) -> Floats:
        """What ``Engine.pooled_hidden`` gives, by one of them."""

    async def reports(self) -> list[EngineStats]:
        """What each of them says of its engine."""


class RemoteEngine:
    """See ``mora_serve.server.parts.ServedEngine``. Lives on the event loop ``loop``.

    ``served`` is told whether there is any replica, each time that this changes.
    """

    def __init__(
        self,
        replicas: Replicas,
        base: RemoteBase,
        said: Description,
        config: Config,
        loop: asyncio.AbstractEventLoop,
        served: Callable[[bool], object] = bool,
    ) -> None:
        self.base = base
        self.max_context = said.max_context
        self.slots = said.slots
        self.adapter_dtype = said.adapter_dtype
        self.lost = 0  # replicas that went away under a request
        self._replicas = replicas
        self._config = config
        self._loop = loop
        self._served = served
        cluster = config.cluster
        most = max(cluster.replicas, cluster.max_replicas) * config.engine.max_batch
        self._places = Places(most + config.engine.max_queue, "requests")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pinned: set[str] = set()
        self._stats = EngineStats()
        self._serving = 1  # replicas, by the last look; one has described itself
        self._deliver: Callable[[Sequence[Event | AdapterLoad]], None] = _nobody
        self._watching: asyncio.Task[None] | None = None
        self._stopping = False

    def start(
        self,
        deliver: Callable[[Sequence[Event | AdapterLoad]], None],
        failed: Callable[[], object] | None = None,
    ) -> None:
        """Watch the replicas from now on. They come and go: as a whole they do not fail."""
        self._deliver = deliver
        self._watching = self._loop.create_task(self._watch())

    def stop(self) -> None:
        """End what runs; for any thread."""
        self._stopping = True
        self._loop.call_soon_threadsafe(self._cancel)

    def check_line(self, tenant: str, prompt: int, max_tokens: int, left: float | None) -> None:
        """Raise Unavailable while there is no replica; a place is taken by ``submit``."""
        if self._stopping or not self._serving:
            raise Unavailable(
                "server: no replica is up at the moment; retry",
                reason="NO_REPLICA",
                retry_after=1.0,
            )

    def submit(self, request: Request) -> asyncio.Future[None]:
        """Give a request to a replica; the future ends when that has admitted it.

        Raises ResourceExhausted where the tenant has no place left, and by the future what the
        replica's engine raises.
        """
        with ExitStack() as stack:
            stack.enter_context(self._places.taken(request.tenant))
            admission: asyncio.Future[None] = self._loop.create_future()
            task = self._loop.create_task(self._run(request, admission))
            self._tasks[request.id] = task
            held = stack.pop_all()

        def ended(_: object) -> None:
            held.close()
            self._tasks.pop(request.id, None)
            if not admission.done():
                admission.cancel()

        task.add_done_callback(ended)
        admission.add_done_callback(_retrieved)
        return admission

    def abort(self, request_id: str, finish: Finish = Finish.CANCELLED) -> None:
        """End a request early, in its replica too."""
        task = self._tasks.get(request_id)
        if task is not None:
            task.cancel()

    def pooled_hidden(
        self,
        texts: Sequence[str],
        depth: int,
        max_tokens: int,
        *,
        background: bool = False,
        tenant: str = "",
    ) -> Future[Floats]:
        """The states of texts, of one of the replicas; for any thread but the event loop's."""
        asked = self._replicas.pool(list(texts), depth, max_tokens, background, tenant)
        return asyncio.run_coroutine_threadsafe(_waited(asked), self._loop)

    def pin(self, digest: str) -> None:
        """Count a pin; the replicas follow the registry. Raises ResourceExhausted."""
        check_pins(self._pinned, digest, self.slots, self._config.adapters.max_mixture)
        self._pinned.add(digest)

    def unpin(self, digest: str) -> None:
        """Count it no longer."""
        self._pinned.discard(digest)

    def stats(self) -> EngineStats:
        """All replicas together, REPORT_SECONDS old at most: sums, and every resident adapter."""
        return self._stats

    async def _run(self, request: Request, admission: asyncio.Future[None]) -> None:
        error: MoraError
        try:
            await self._serve(request, admission)
            return
        except MoraError as e:
            error = e
        except Exception:
            log.exception("request %s failed", request.id)
            error = Internal("internal error; retry the request")
        failure = Failure.of(error)
        self._deliver([Event(request.id, finish=Finish.ERROR, error=failure)])
        if not admission.done():
            admission.set_exception(error)

    async def _serve(self, request: Request, admission: asyncio.Future[None]) -> None:
        sent = Sent()
        for attempt in range(ATTEMPTS):
            if attempt:  # whoever knows of the loss tells the router in the meantime
                await asyncio.sleep(PAUSE * 2**attempt)
            sent.restart()
            left = None if request.deadline is None else request.deadline - time.monotonic()
            try:
                async with aclosing(self._replicas.stream(request, left)) as items:
                    async for item in items:
                        if item is None:
                            if not admission.done():
                                admission.set_result(None)
                            continue
                        event = sent.rest(_checked(item))
                        if event is None:
                            continue
                        # Under its id here: the replica's bridge has given it another.
                        self._deliver([replace(event, request_id=request.id)])
                        if event.finish is not None:
                            return
                raise ReplicaLost
            except ReplicaLost:
                self.lost += 1
                log.warning("request %s: its replica is lost; another one takes it", request.id)
            except Diverged:
                log.warning("request %s: another replica's answer differs", request.id)
                break
        raise Unavailable(
            "server: the replica that served this request is lost; retry it",
            reason="REPLICA_LOST",
            retry_after=0.5,
        )

    async def _watch(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REPORT_TIMEOUT):
                    reports = await self._replicas.reports()
            except Exception as e:
                log.warning("the replicas do not report: %s", type(e).__name__)
            else:
                if bool(reports) != bool(self._serving):
                    self._served(bool(reports))
                self._serving = len(reports)
                self._stats = total(reports)
            await asyncio.sleep(REPORT_SECONDS)

    def _cancel(self) -> None:
        for task in (*self._tasks.values(), *([self._watching] if self._watching else [])):
            task.cancel()


def total(reports: Sequence[EngineStats]) -> EngineStats:
    """Several engines as one: numbers added, except of a page, and digests joined."""
    if not reports:
        return EngineStats()
    values: dict[str, object] = {}
    for field in fields(EngineStats):
        of = [getattr(report, field.name) for report in reports]
        joined = isinstance(of[0], tuple)
        values[field.name] = tuple(sorted({d for t in of for d in t})) if joined else sum(of)
    values["page_size"] = reports[0].page_size
    return EngineStats(**values)  # type: ignore[arg-type]


def _checked(item: Event | Failure) -> Event:
    """The event. Raises what a failure says, and ReplicaLost where another replica can do it."""
    failure = item if isinstance(item, Failure) else item.error
    if failure is not None and failure.code == Unavailable.code:
        raise ReplicaLost
    if isinstance(item, Failure):
        raise item.error()
    if item.finish is Finish.CANCELLED:  # not by the caller: its task would be cancelled
        raise ReplicaLost
    return item


async def _waited(asked: object) -> Floats:
    return await asked  # type: ignore[misc,no-any-return]


def _retrieved(admission: asyncio.Future[None]) -> None:
    """The caller may be gone, and not look at it."""
    if not admission.cancelled():
        admission.exception()


def _nobody(events: Sequence[Event | AdapterLoad]) -> None:
    """Before the start."""
