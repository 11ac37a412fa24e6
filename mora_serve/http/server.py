"""The HTTP port: uvicorn inside the server's own event loop, with the bounds that it lacks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mora_serve.errors import ResourceExhausted
from mora_serve.server import tls
from mora_serve.server.gate import Places
from mora_serve.server.strangers import host_of

# For TLS's handshake; then for a request's headers, from its first byte or the connection's.
HEADER_SECONDS = 15.0
KEEP_ALIVE_SECONDS = 75  # for the next request of a connection
HEADER_BYTES = 64 << 10
CONNECTIONS = 4096
_BACKLOG = 1024

log = logging.getLogger(__name__)


class Protocol(H11Protocol):
    """One connection; ends it where no request comes in time, and can end at once.

    ``places`` bounds how many there are: a host has at most half of those that others leave.
    """

    def __init__(self, *args: Any, places: Places, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._places = places
        self._place = ExitStack()
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, "abort": transport.abort}
        host = self.client[0] if self.client else ""
        try:
            self._place.enter_context(self._places.taken(host_of(f"http:{host}:0")))
        except ResourceExhausted:
            transport.abort()
            return
        self._await_request()

    def data_received(self, data: bytes) -> None:
        """Some bytes have come: of headers, or of a body."""
        if self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._await_request()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._stop_waiting()
        self._place.close()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP: say so, or hang up where an answer has begun or is over."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _await_request(self) -> None:
        self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class _Uvicorn(uvicorn.Server):
    """Leaves the process's signals to the server that it is a part of; handshakes are bounded."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections."""
        config = self.config
        protocol: Callable[..., asyncio.Protocol] = config.http_protocol_class
        make = partial(
            protocol,
            config=config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        secure: dict[str, Any] = {}
        if config.ssl is not None:
            secure = {"ssl": config.ssl, "ssl_handshake_timeout": HEADER_SECONDS}
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(make, sock=listening, backlog=_BACKLOG, **secure)
            for listening in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class HttpServer:
    """Serves ``app`` on a socket that listens already."""

    def __init__(self, app: ASGIApp, listening: socket.socket, secure: ssl.SSLContext | None):
        self.places = Places(most_connections(), "connections")
        config = uvicorn.Config(
            app,
            http=partial(Protocol, places=self.places),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # what strangers get wrong on a connection would fill the log
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        config.load()
        config.ssl = secure
        self._uvicorn = _Uvicorn(config)
        self._socket = listening
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take connections from now on."""
        self._task = asyncio.ensure_future(self._uvicorn.serve(sockets=[self._socket]))
        while not self._uvicorn.started and not self._task.done():
            await asyncio.sleep(0.005)
        if self._task.done():
            self._task.result()  # what kept it from starting

    async def stop(self, seconds: float) -> None:
        """Hang up, on idle clients at once, on others when they have their answers."""
        if self._task is None:
            self._socket.close()
            return
        self._uvicorn.should_exit = True
        done, _ = await asyncio.wait((self._task,), timeout=seconds)
        if not done:
            self._uvicorn.force_exit = True
            for connection in list(self._uvicorn.server_state.connections):
                connection.transport.abort()
            await asyncio.wait((self._task,), timeout=1.0)


def most_connections() -> int:
    """``CONNECTIONS``, or half of the files that the process may open: gRPC's are among them."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return CONNECTIONS if files == resource.RLIM_INFINITY else min(CONNECTIONS, files // 2)


def listen(host: str, port: int, prefix: str) -> socket.socket:
    """A socket that listens.

    Raises ConfigError, naming ``prefix`` + ``host`` or ``port``, for an address that cannot be
    listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError:
        listening.close()
        raise tls.cannot_listen(host, port, prefix) from None
    listening.setblocking(False)
    return listening
