"""The server: build, serve, drain.

async with MoraServer(config) as server:
    print(server.address)
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeVar

from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from mora_serve import __version__
from mora_serve.access.audit import Audit
from mora_serve.access.door import Door
from mora_serve.access.limits import Meter
from mora_serve.config import Config
from mora_serve.errors import ConfigError
from mora_serve.loopback import is_loopback
from mora_serve.metrics import Metrics
from mora_serve.server import ending, health, lag, tls, tracing
from mora_serve.server.bridge import Bridge
from mora_serve.server.feedback import FeedbackRecorder
from mora_serve.server.gate import Gate, State
from mora_serve.server.interceptors import CallInterceptor, Entrance
from mora_serve.server.memory import limit_arenas
from mora_serve.server.services import SERVICES, LateServices, Threads, add_services
from mora_serve.server.strangers import Strangers

if TYPE_CHECKING:
    from mora_serve.http.port import HttpPort
    from mora_serve.server.assembly import Assembly

log = logging.getLogger(__name__)

_MOST_STREAMS = 4096  # calls at the same time on one connection; a client's others wait in it
_LARGEST_ANSWER = 64 << 20  # bytes: what answers are made of has limits of its own

_KEEPALIVE = (
    ("grpc.keepalive_time_ms", 60_000),  # finds clients that vanished without a word
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # what clients may do
)

T = TypeVar("T")


class MoraServer:
    """One server in this process: ready inside its context, drained when it ends.

    ``assemble`` makes its parts, off the event loop; by default ``assembly.assemble``.

    ``port``, ``admin_port``, ``http_port`` and ``metrics_port`` are the real ones once it listens;
    0, and -1 where there is none.

    Raises ConfigError for an access file or an audit log that cannot be used.
    """

    def __init__(
        self, config: Config, assemble: Callable[[Config], Assembly] | None = None
    ) -> None:
        self.config = config
        self._assembling = assemble
        self.metrics = Metrics(__version__)
        self.port = 0
        self.admin_port = -1
        self.metrics_port = -1
        self.failed = asyncio.Event()  # the engine is gone, and nothing brings it back
        self._gate = Gate()
        audit = Audit(Path(config.access.audit) if config.access.audit else None)
        self._entrance = Entrance(Door(config.access), self._gate, Meter(), audit)
        self._health = health.HealthServicer(SERVICES)
        self._services = LateServices()
        self._servers: list[aio.Server] = []
        self._exposition: Any = None
        self.http_port = -1
        self._http: HttpPort | None = None
        self._assembly: Assembly | None = None
        self._bridge: Bridge | None = None
        self._feedback: FeedbackRecorder | None = None
        self._tracing: tracing.Tracing | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._threads = Threads()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop(drain_seconds=0)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    @property
    def address(self) -> str:
        """Host and port, as clients want it."""
        return tls.join(self.config.server.host, self.port)

    async def start(self) -> None:
        """Listen, load, serve; health says NOT_SERVING until the end.

        Raises ConfigError for a configuration that cannot be served.
        """
        self._run(lag.watch(self.metrics))
        self._tracing = tracing.of(self.config)
        self._listen()
        for server in self._servers:
            await server.start()
        if self._http is not None:
            await self._http.start()
        self._assembly = assembly = await _on_daemon_thread(self._assemble)
        loop = asyncio.get_running_loop()
        self._bridge = Bridge(assembly.engine, self.metrics, loop)
        self._feedback = FeedbackRecorder.of(assembly, self.metrics)
        services = add_services(
            self._services,
            assembly,
            self._bridge,
            self.metrics,
            self._threads,
            self._feedback,
            self._entrance.audit,
            self._tracing,
        )
        if self._http is not None:
            self._http.serve(assembly, services)
        assembly.engine.start(self._bridge.deliver, partial(loop.call_soon_threadsafe, self._fail))
        self._gate.state = State.SERVING
        self._health.set(serving=True)
        log.info("serving on %s", self.address)

    def say(self, serving: bool) -> None:
        """Say by the health whether calls can be served: not while the engines are elsewhere."""
        if self._gate.state is State.SERVING:
            log.warning("health: %s", "SERVING" if serving else "NOT_SERVING")
            self._health.set(serving=serving)

    async def stop(self, drain_seconds: float | None = None, *, hang_up: bool = True) -> None:
        """Refuse new calls, wait for those that run, end what is left, free everything.

        ``drain_seconds`` is how long to wait, by default what the configuration says. Without
        ``hang_up`` the port stays open and refuses calls until the process ends: to hang up, grpc
        cancels the calls that it has not handed over yet, and their callers would not know why.
        """
        seconds = self.config.server.drain_seconds if drain_seconds is None else drain_seconds
        times = ending.Times.of(seconds)
        self._health.end()
        if self._gate.state is State.SERVING:
            log.info("draining, at most %g s", seconds)
            # Whoever watches the health has heard it, and what it has sent already is taken.
            await asyncio.sleep(
                min(self.config.server.drain_wait_seconds, ending.WAITING * seconds)
            )
        if not await self._gate.drain(ending.left(times.finishing)):
            log.warning("%d calls have not ended in time; they are ended", self._gate.expel())
            await self._gate.empty(ending.left(times.writing))
        # These return earlier, unless somebody watches the health, or does not read.
        hanging_up = [] if self._http is None else [self._http.stop(times.last)]
        if hang_up:
            hanging_up += [server.stop(times.last) for server in self._servers]
        else:
            hanging_up.append(asyncio.sleep(ending.LEAST))  # for the last bytes of calls
        await asyncio.gather(*hanging_up)
        await self._close_parts(times.closing)
        self._threads.shutdown()
        await self._close([self._entrance.audit.close], times.closing)
        for task in self._tasks:
            task.cancel()
        log.info("stopped")

    async def _close_parts(self, until: float) -> None:
        """Free everything, or leave behind what takes its time."""
        parts: list[Callable[[], object]] = []
        if self._feedback is not None:
            parts.append(self._feedback.close)
        if self._assembly is not None:
            parts.append(self._assembly.close)
        exposition: list[Callable[[], object]] = []
        if self._exposition is not None:
            exposition += [self._exposition.shutdown, self._exposition.server_close]
        traces = [] if self._tracing is None else [self._tracing.close]
        await asyncio.gather(*(self._close(works, until) for works in (parts, exposition, traces)))

    async def _close(self, works: Iterable[Callable[[], object]], until: float) -> None:
        for work in works:
            try:
                async with asyncio.timeout(ending.left(until)):
                    await _on_daemon_thread(work)
            except TimeoutError:
                log.warning("%s is not done in time; it is left behind", work.__qualname__)
            except Exception:
                log.exception("%s failed", work.__qualname__)

    def _fail(self) -> None:
        """The engine is gone: every caller is sent elsewhere, and the process is to end."""
        if self.failed.is_set():
            return
        log.critical("the engine has failed: calls are ended, and the server is to be restarted")
        self.failed.set()
        self._gate.fail()
        self._health.end()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` beside the calls, until the server stops at the latest."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _make(self, entrance: Entrance, *, apart: bool) -> aio.Server:
        size = self.config.server.max_message_bytes
        server = aio.server(
            interceptors=(
                CallInterceptor(
                    self.metrics,
                    entrance,
                    self.config.engine.stall_seconds,
                    log_calls=self.config.server.log_calls,
                    apart=apart,
                ),
            ),
            options=(
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", max(size, _LARGEST_ANSWER)),
                ("grpc.max_concurrent_streams", _MOST_STREAMS),
                ("grpc.so_reuseport", 0),  # a port in use is an error
                *_KEEPALIVE,
            ),
        )
        server.add_generic_rpc_handlers((self._services,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*SERVICES, health.SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _listen(self) -> None:
        config = self.config.server
        apart = config.admin_port >= 0
        self.port = self._bind(self._make(self._entrance, apart=apart), config.host, config.port)
        if apart:
            self.admin_port = self._bind(
                self._make(replace(self._entrance, strangers=Strangers()), apart=False),
                config.admin_host,
                config.admin_port,
                "server.admin_",
            )
        if config.http_port >= 0:
            self._http = self._listen_http()
            self.http_port = self._http.port
        if config.metrics_port < 0:
            return
        try:
            self._exposition, _ = start_http_server(
                config.metrics_port, config.metrics_host, self.metrics.registry
            )
        except socket.gaierror:
            raise ConfigError(
                f"server.metrics_host: {config.metrics_host!r} is no address of this machine; "
                "give one, such as 127.0.0.1",
                field="server.metrics_host",
            ) from None
        except OSError as e:
            raise ConfigError(
                f"server.metrics_port: {tls.join(config.metrics_host, config.metrics_port)} cannot "
                f"be listened on ({e.strerror}); choose another port, or -1 for none",
                field="server.metrics_port",
            ) from None
        self.metrics_port = self._exposition.server_port

    def _bind(
        self,
        server: aio.Server,
        host: str,
        port: int,
        prefix: str = "server.",
    ) -> int:
        """Listen with a server from now on; the real port."""
        self._check_reach(host, prefix)
        config = self.config.server
        # Each port has credentials of its own: grpc takes those whose files may change once.
        bound = tls.add_port(server, host, port, config, tls.credentials(config), prefix)
        self._servers.append(server)
        return bound

    def _listen_http(self) -> HttpPort:
        """Listen for HTTP from now on."""
        try:
            from mora_serve.http.port import HttpPort  # an extra
        except ModuleNotFoundError as e:
            raise ConfigError(
                f"server.http_port: it needs {e.name}, which is not installed; "
                "pip install 'mora-serve[http]', or set it to -1",
                field="server.http_port",
            ) from None
        self._check_reach(self.config.server.http_host, "server.http_")
        return HttpPort(self.config, self.metrics, self._entrance, self._threads)

    def _check_reach(self, host: str, prefix: str) -> None:
        """Raise ConfigError where strangers could do all, and nobody said that they may."""
        if not (
            self._entrance.door.locked or self.config.access.allow_anonymous or is_loopback(host)
        ):
            raise ConfigError(
                f"{prefix}host: {host!r} can be reached from other machines, and without keys "
                "whoever reaches the server may do all; set access.file, or "
                "access.allow_anonymous = true where a proxy decides who comes this far",
                field=f"{prefix}host",
            )

    def _assemble(self) -> Assembly:
        if self._assembling is not None:
            return self._assembling(self.config)
        from mora_serve.server.assembly import assemble  # imports torch: a second or more

        return assemble(self.config)


def serve(config: Config) -> NoReturn:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends the process at once.

    It is the process's last act, whose exit status is 0, or ``ending.ENGINE_FAILED`` when the
    engine failed or hung. Raises ConfigError for a configuration that cannot be served.
    """
    limit_arenas()
    asyncio.run(_serve(config))


async def _serve(config: Config) -> NoReturn:
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()

    def end(number: signal.Signals) -> None:
        if signalled.is_set():
            log.warning("%s again: ending at once", number.name)
            logging.shutdown()
            os._exit(128 + number)  # threads are in the middle of something: nothing is awaited
        log.info("%s: stopping", number.name)
        ending.end_after(max(config.server.drain_seconds - ending.MARGIN, ending.LEAST_SECONDS), 0)
        signalled.set()

    for s in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(s, end, s)
    server = MoraServer(config)
    starting = asyncio.ensure_future(server.start())
    waiting = asyncio.ensure_future(signalled.wait())
    failing = asyncio.ensure_future(server.failed.wait())
    tasks = (starting, waiting, failing)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _settle()
            await asyncio.wait((waiting, failing), return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        await server.stop()
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if server.failed.is_set():
        ending.end_after(ending.FAILED_SECONDS, ending.ENGINE_FAILED)
        await server.stop(ending.FAILED_SECONDS / 2, hang_up=False)
    else:
        await server.stop(hang_up=False)
    ending.end_now(ending.ENGINE_FAILED if server.failed.is_set() else 0)


def _settle() -> None:
    """Suit the interpreter to a server, which this process is from now on.

    What was made at the start lives to the end: with thousands of adapters, looking at it again at
    each collection of garbage would stop all threads for a quarter of a second. And a thread that
    computes gives way to the event loop after one millisecond instead of five.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(0.001)


async def _on_daemon_thread(work: Callable[[], T]) -> T:
    """Run ``work`` on a thread that does not keep the process alive; await its result."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as e:
            result, error = None, e
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    def settle(result: Any, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await done
