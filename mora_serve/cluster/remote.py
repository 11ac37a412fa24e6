"""The engines of all replicas, as one engine for the gateway's server.

What crosses is what crosses between a server and its engine's thread: ``core``'s Request one way,
its Events the other, an error as a ``Failure``. A request whose replica is lost goes to another
one, which its caller does not notice (see ``resume``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace

from mora_serve.cluster.resume import Diverged, Sent
from mora_serve.cluster.totals import Totals
from mora_serve.cluster.wire import OTHER_BASE, Description, Pooling, ReplicaLost, Replicas
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
REPORT_TIMEOUT = 30.0  # a replica with all the requests that it takes answers when one has ended
# Reasons of a replica that cannot serve, which others can: the caller is not told them.
_GOING = ("UNAVAILABLE", "DRAINING", "ENGINE_FAILED", OTHER_BASE.reason)


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
        self._totals = Totals()
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
        pooling = Pooling(tuple(texts), depth, max_tokens, background, tenant)
        asked = self._replicas.pool(pooling, self.base.fingerprint)
        return asyncio.run_coroutine_threadsafe(_waited(asked), self._loop)

    def pin(self, digest: str) -> None:
        """Count a pin; the replicas follow the registry. Raises ResourceExhausted."""
        check_pins(self._pinned, digest, self.slots, self._config.adapters.max_mixture)
        self._pinned.add(digest)

    def unpin(self, digest: str) -> None:
        """Count it no longer."""
        self._pinned.discard(digest)

    def stats(self) -> EngineStats:
        """All replicas together, by the last look that all of them answered; see ``Totals``."""
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
        if not admission.done():
            admission.set_exception(error)
            return
        failure = Failure.of(error)
        self._deliver([Event(request.id, finish=Finish.ERROR, error=failure)])

    async def _serve(self, request: Request, admission: asyncio.Future[None]) -> None:
        sent = Sent()
        said: Failure | None = None
        for attempt in range(ATTEMPTS):
            if attempt:  # whoever knows of the loss tells the router in the meantime
                await asyncio.sleep(PAUSE * 2**attempt)
            sent.restart()
            left = None if request.deadline is None else request.deadline - time.monotonic()
            try:
                stream = self._replicas.stream(request, left, self.base.fingerprint)
                async with aclosing(stream) as items:
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
            except ReplicaLost as e:
                self.lost += 1
                said = e.said
                why = "lost" if said is None else said.reason
                log.warning("request %s: its replica is %s; another one tries", request.id, why)
            except Diverged:
                log.warning("request %s: another replica's answer differs", request.id)
                said = None
                break
        if said is not None and said.reason not in _GOING:  # the store's, say
            raise said.error()
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
                self._stats = self._totals.of(reports)
            await asyncio.sleep(REPORT_SECONDS)

    def _cancel(self) -> None:
        for task in (*self._tasks.values(), *([self._watching] if self._watching else [])):
            task.cancel()


def _checked(item: Event | Failure) -> Event:
    """The event. Raises what a failure says, and ReplicaLost where another replica can do it."""
    failure = item if isinstance(item, Failure) else item.error
    if failure is not None and failure.code == Unavailable.code:
        raise ReplicaLost(failure)
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
