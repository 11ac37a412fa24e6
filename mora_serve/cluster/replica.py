"""A replica: the engine, in an actor of Ray Serve's.

Whatever goes wrong leaves it as a ``Failure``: Ray would send an exception with its traceback.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, aclosing, suppress
from typing import TYPE_CHECKING, Any

from mora_serve import __version__
from mora_serve.cluster.uses import Uses
from mora_serve.cluster.wire import OTHER_BASE, Description, Pooling
from mora_serve.config import Config
from mora_serve.core import EngineStats, Event, Request
from mora_serve.errors import Failure, MoraError, ResourceExhausted
from mora_serve.metrics import Metrics
from mora_serve.server.assembly import load, make_engine, open_registry
from mora_serve.server.bridge import Bridge
from mora_serve.server.fetching import Fetcher
from mora_serve.server.follow import Pins
from mora_serve.server.poll import Poller

if TYPE_CHECKING:
    from mora_serve.router.arrays import Floats

log = logging.getLogger(__name__)

INTERNAL = Failure("INTERNAL", "INTERNAL", "internal error; retry the request")
ASK_SECONDS = 2.0  # for what other replicas use most; where there are none nobody answers

Hottest = Callable[[int, float], Sequence[str]]  # count, seconds -> digests


class Replica:
    """Serves requests with an engine of its own.

    ``hottest`` asks other replicas which adapters they use most. ``failed`` is told that the engine
    is gone, on any thread, once or twice: nothing but another process brings it back. Made on the
    event loop on which its methods run, which it blocks until the base is loaded.

    Raises ConfigError for a configuration that cannot be served.
    """

    def __init__(
        self,
        config: Config,
        hottest: Hottest | None = None,
        failed: Callable[[], object] = bool,
    ) -> None:
        self._config = config
        self._failed = threading.Event()
        self._tell = failed
        self._uses = Uses()
        self._streams = 0  # requests that are answered
        base, team = load(config)
        self._registry = open_registry(config, base)
        self._engine = make_engine(config, base, team, self._registry)
        loop = asyncio.get_running_loop()
        self._bridge = Bridge(self._engine, Metrics(__version__), loop)
        self._threads = ThreadPoolExecutor(2, "contents")
        self._fetching = ThreadPoolExecutor(4, "fetch")
        stats = self._engine.stats
        self._fetcher = Fetcher(self._registry, self._fetching, lambda: stats().resident)
        self._engine.start(self._bridge.deliver, self._fail)
        self._poller = Poller(self._registry, config.server.store_poll_seconds)
        if hottest is not None:
            self._warm(hottest)
        self._pins = Pins(self._engine, self._registry, self._fetching)

    def describe(self) -> Description:
        """What does not change while it runs."""
        base = self._engine.base
        return Description(
            name=base.name,
            fingerprint=base.fingerprint,
            quantization=base.quantization,
            dtype=base.dtype,
            device=base.device,
            max_context=self._engine.max_context,
            slots=self._engine.slots,
            adapter_dtype=self._engine.adapter_dtype,
        )

    def report(self) -> EngineStats:
        """What its engine does now."""
        return self._engine.stats()

    def hottest(self, count: int) -> list[str]:
        """The digests that it has used most lately."""
        return self._uses.most(count)

    def record_routing_stats(self) -> dict[str, Any]:
        """What Serve tells the request routers of all gateways.

        ``misses`` makes a report another one wherever an adapter came or went since the last.
        """
        stats = self._engine.stats()
        return {
            "resident": sorted(stats.resident),
            "slots": stats.slots,
            "misses": stats.slot_misses,
        }

    def check_health(self) -> None:
        """Raise where the engine is gone: Serve then replaces this replica."""
        if self._failed.is_set():
            raise RuntimeError("the engine has failed")

    async def generate(
        self, request: Request, left: float | None, fingerprint: str
    ) -> AsyncGenerator[Event | Failure | None, None]:
        """One request: None once the engine has it, then its events; or a Failure.

        ``left`` is the time to its deadline, in seconds, ``fingerprint`` of the base that it is
        for: while an application is given another, its gateways and replicas differ. Closing the
        iterator ends the request.
        """
        if fingerprint != self._engine.base.fingerprint:
            yield OTHER_BASE
            return
        now = time.monotonic()
        deadline = None if left is None else now + left
        request = dataclasses.replace(request, arrival=now, deadline=deadline)
        try:
            async with aclosing(self._answer(request)) as items:
                async for item in items:
                    yield item
        except MoraError as e:
            yield Failure.of(e)
        except Exception:
            log.exception("request %s failed", request.id)
            yield INTERNAL

    async def pool(self, pooling: Pooling, fingerprint: str) -> Floats | Failure:
        """What ``Engine.pooled_hidden`` gives, for a router on hidden states."""
        if fingerprint != self._engine.base.fingerprint:
            return OTHER_BASE
        try:
            asked = self._engine.pooled_hidden(
                pooling.texts,
                pooling.depth,
                pooling.max_tokens,
                background=pooling.background,
                tenant=pooling.tenant,
            )
            return await asyncio.wrap_future(asked)
        except MoraError as e:
            return Failure.of(e)
        except Exception:
            log.exception("pooling failed")
            return INTERNAL

    def close(self) -> None:
        """End what runs and let go of everything."""
        self._poller.close()
        self._engine.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._fetching.shutdown(wait=False, cancel_futures=True)
        self._registry.close()

    def _fail(self) -> None:
        self._failed.set()
        self._tell()

    async def _answer(self, request: Request) -> AsyncGenerator[Event | None, None]:
        digests = [digest for digest, _ in request.mixture.merged()]
        holding: Future[list[str]] | None = None
        self._streams += 1
        try:
            if digests:
                holding = self._threads.submit(self._hold, digests)
                await asyncio.wrap_future(holding)
                await self._fetcher.fetch(digests)
            self._uses.add(digests)
            async with self._bridge.submit(request) as generation:
                yield None
                first = True
                async for event in generation:
                    if not (event.tokens or event.text or event.finish):
                        continue
                    yield event
                    # The first token at once; then what a moment brings, in one message.
                    if not first and event.finish is None:
                        await generation.gather(self._pause)
                    first = False
        finally:
            self._streams -= 1
            if holding is not None:  # it may be at work still
                holding.add_done_callback(self._let_go)

    @property
    def _pause(self) -> float:
        """Seconds between two messages of a stream: what a message costs, at a gateway above all,
        is the same for one token as for ten.
        """
        cluster = self._config.cluster
        return min(cluster.flush_seconds, self._streams / cluster.messages)

    def _hold(self, digests: Iterable[str]) -> list[str]:
        """Hold contents; one that is to come still is looked for once more."""
        with ExitStack() as releases:
            held = []
            for digest in digests:
                try:
                    self._registry.retain(digest)
                except MoraError:
                    self._registry.refresh()
                    self._registry.retain(digest)
                releases.callback(self._registry.release, digest)
                held.append(digest)
            releases.pop_all()
        return held

    def _let_go(self, holding: Future[list[str]]) -> None:
        """Release what was held, on a thread; nothing where it was not."""
        if holding.cancelled() or holding.exception() is not None:
            return
        with suppress(RuntimeError):  # the replica is closed
            for digest in holding.result():
                self._threads.submit(self._registry.release, digest)

    def _warm(self, hottest: Hottest) -> None:
        """Load what the others use most, before the first request."""
        room = self._engine.slots - self._config.adapters.max_mixture
        wanted = hottest(room, ASK_SECONDS)
        until = time.monotonic() + self._config.cluster.warm_seconds
        with ExitStack() as pins:
            pinned = set()
            for digest in wanted:
                try:
                    self._registry.retain(digest)
                except MoraError:
                    continue  # it has gone since
                pins.callback(self._registry.release, digest)
                try:
                    self._engine.pin(digest)
                except ResourceExhausted:
                    break
                pins.callback(self._engine.unpin, digest)
                pinned.add(digest)
            while time.monotonic() < until and not pinned <= set(self._engine.stats().resident):
                time.sleep(0.05)
        if pinned:
            log.info("warm: %d adapters that other replicas use", len(pinned))
