"""The outermost layer of every HTTP call: its identity, its errors, its duration.

It does for HTTP what ``server/interceptors.py`` does for gRPC, with the same door, gate, limits and
audit: a call is let in by its headers alone, before a byte of its body is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import ExitStack, asynccontextmanager
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mora_serve.access.door import Caller, Denied
from mora_serve.access.roles import ALLOWED
from mora_serve.errors import (
    InvalidArgument,
    MoraError,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
)
from mora_serve.http import errors
from mora_serve.loopback import is_loopback
from mora_serve.metrics import Metrics
from mora_serve.server import call as calls
from mora_serve.server import logs
from mora_serve.server.interceptors import Entrance

REQUEST_ID = "x-request-id"
EVENTS = b"text/event-stream"
_PORT = re.compile(r":\d*$")
_WHATEVER_THE_STATE = frozenset({"/metrics"})
# For whoever reaches the port.
OPEN = frozenset({"/", "/console/{file}", "/healthz", "/docs", "/openapi.json"})

log = logging.getLogger(__name__)


class Names(Protocol):
    """Tells the name of what a request asks for."""

    def __call__(self, scope: Scope) -> str | None:
        """A route's path as it is declared, or None where there is none."""


class Guard:
    """Wraps the application.

    ``names`` gives the route of a request; it is what roles, metrics and logs know it by.
    ``most_bytes`` bounds a body, except of those routes that are ``streaming``; ``stall_seconds``
    one read and one write. ``hosts`` are the names that the server may be asked for by besides this
    machine's own; None: any.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Names,
        metrics: Metrics,
        entrance: Entrance,
        stall_seconds: float,
        most_bytes: int,
        *,
        streaming: Collection[str] = (),
        hosts: Collection[str] | None,
        log_calls: bool,
        apart: bool,
    ) -> None:
        self._app = app
        self._names = names
        self._metrics = metrics
        self._entrance = entrance
        self._stall_seconds = stall_seconds
        self._most_bytes = most_bytes
        self._log_calls = log_calls
        self._apart = apart
        self._streaming = streaming
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        request_id, usable = calls.request_id(_metadata(headers))
        answer = _Answer(send, request_id, self._stall_seconds, scope, usable=usable)
        try:
            await self._serve(scope, receive, answer, headers)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not answer.left or task is None:
                raise
            task.uncancel()

    async def _serve(
        self, scope: Scope, receive: Receive, answer: _Answer, headers: Mapping[str, str]
    ) -> None:
        start = time.monotonic()
        method = self._names(scope)
        request_id = answer.request_id
        calls.enter(calls.Call(request_id, Caller("")))
        outcome, known = "OK", False
        try:
            if not answer.usable:
                raise InvalidArgument(
                    f"{REQUEST_ID}: use at most 128 letters, digits and '.', '_', ':', '/', '-', "
                    "starting with a letter or a digit, or leave it out",
                    field=REQUEST_ID,
                )
            if method is None:
                raise errors.no_such_path()
            self._check_origin(headers)
            caller = self._admit(method, request_id, headers)
            calls.enter(calls.Call(request_id, caller, parent=calls.parent_of(headers)))
            known = True
            await self._inside(method, caller, scope, receive, answer)
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            raise
        except Exception as e:
            error = self._error(e, method or "unknown", request_id)
            outcome = error.code
            known = known or isinstance(error, Denied)
            if isinstance(error, PermissionDenied):
                self._denied(method or "unknown", request_id, calls.current().caller, error)
            self._metrics.refused(error)
            await answer.fail(error)
        finally:
            seconds = time.monotonic() - start
            self._metrics.rpc(method or "unknown", outcome, seconds)
            if self._log_calls:
                # What strangers send does not fill the log, nor does who asks for the health.
                quiet = method in OPEN or (self._entrance.door.locked and not known)
                logs.ended(method or "unknown", outcome, seconds, request_id, quiet=quiet)

    def _check_origin(self, headers: Mapping[str, str]) -> None:
        """Raise PermissionDenied for what a page of another site has a browser ask."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise PermissionDenied(
                "origin: pages of other sites may not call this server; put it behind their own",
                field="origin",
                reason="OTHER_ORIGIN",
            )
        # Such a page may also have had its name lead here.
        name = host.rpartition(":")[0] if _PORT.search(host) else host
        if self._hosts is not None and not is_loopback(name) and name.lower() not in self._hosts:
            raise PermissionDenied(
                "host: the server does not go by this name; ask for it as localhost, or have the "
                "name added to server.http_names",
                field="host",
                reason="OTHER_HOST",
            )

    def _admit(self, method: str, request_id: str, headers: Mapping[str, str]) -> Caller:
        if method in OPEN:
            return Caller()
        try:
            return self._entrance.door.admit(method, headers, self._apart)
        except Unauthenticated as e:
            self._denied(method, request_id, Caller(""), e)
            raise
        except Denied as e:
            calls.enter(calls.Call(request_id, e.caller))
            raise

    def _denied(self, method: str, request_id: str, caller: Caller, error: MoraError) -> None:
        self._entrance.audit.denied(
            request_id=request_id,
            tenant=caller.tenant,
            key=caller.key,
            method=method if method in ALLOWED else "unknown",
            reason=error.reason,
        )

    async def _inside(
        self, method: str, caller: Caller, scope: Scope, receive: Receive, answer: _Answer
    ) -> None:
        if method in OPEN:
            await self._app(scope, receive, answer.send)
            return
        with ExitStack() as inside:
            if method not in _WHATEVER_THE_STATE:
                inside.enter_context(self._entrance.gate.passing())
            inside.enter_context(self._entrance.meter.passing(caller.tenant, caller.limits))
            if method in self._streaming:
                await self._app(scope, self._arriving(receive, answer), answer.send)
                return
            body = await self._body(scope, receive, answer)
            async with _watched(receive, answer):
                await self._app(scope, _replay(body), answer.send)

    def _arriving(self, receive: Receive, answer: _Answer) -> Receive:
        """Gives a body as it comes; whoever takes it bounds its size."""

        async def arrived() -> Message:
            async with _in_time(self._stall_seconds):
                message = await receive()
            if message["type"] == "http.disconnect":
                answer.left = True
                raise asyncio.CancelledError
            return message

        return arrived

    async def _body(self, scope: Scope, receive: Receive, answer: _Answer) -> bytes:
        """The whole body."""
        headers = dict(scope["headers"])
        stated = headers.get(b"content-length", b"")
        if stated.isdigit() and int(stated) > self._most_bytes:
            raise self._too_large()
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            # Also what keeps a page of another site, open in a browser here, from asking.
            raise InvalidArgument(
                "content-type: the body is to be JSON; send 'content-type: application/json'",
                field="content-type",
                reason="NOT_JSON",
            )
        parts, size, more = [], 0, True
        arrived = self._arriving(receive, answer)
        async with _in_time(self._stall_seconds):
            while more:
                message = await arrived()
                size += len(message.get("body", b""))
                if size > self._most_bytes:
                    raise self._too_large()
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self) -> InvalidArgument:
        return InvalidArgument(
            f"body: it is larger than server.max_message_bytes ({self._most_bytes}); send less",
            reason="BODY_TOO_LARGE",
        )

    def _error(self, error: Exception, method: str, request_id: str) -> MoraError:
        if isinstance(error, MoraError):
            return error.with_traceback(None)
        if isinstance(error, HTTPException):
            if error.status_code == 405:
                return errors.wrong_method()
            if error.status_code == 404:
                return errors.no_such_path()
            return InvalidArgument("body: it cannot be read; send a JSON object")
        log.exception("request %s: %s failed", request_id, method)
        return errors.internal(request_id)


class _Answer:
    """What is sent: knows how far it is, bounds each write, ends with an error where that fits."""

    def __init__(
        self, send: Send, request_id: str, stall_seconds: float, scope: Scope, *, usable: bool
    ) -> None:
        self._send = send
        self.request_id = request_id
        self.usable = usable  # whether what the client sent for an id was
        self._stall_seconds = stall_seconds
        self._abort = scope.get("state", {}).get("abort")
        self._started = False
        self._events = False
        self._stalled = False
        self.ended = False
        self.left = False  # the client has gone

    async def send(self, message: Message) -> None:
        """Send a part of the answer. Raises ResourceExhausted where the client does not read."""
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            self._events = any(v.startswith(EVENTS) for k, v in headers if k == b"content-type")
            own = (REQUEST_ID.encode(), self.request_id.encode())
            message = {**message, "headers": [*headers, own]}
            self._started = True
        elif not message.get("more_body", False):
            self.ended = True
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._send(message)
        except TimeoutError:
            self._stalled = True
            raise ResourceExhausted(
                f"stream: the client read nothing for {self._stall_seconds:g} seconds; read "
                "events as they come, or do not stream",
                reason="STREAM_STALLED",
            ) from None

    async def fail(self, error: MoraError) -> None:
        """End with an error: as the answer, as a stream's last event, or by hanging up."""
        if self.ended:
            return
        with contextlib.suppress(ResourceExhausted):
            if not self._started:
                body = errors.encoded(error)
                length = (b"content-length", str(len(body)).encode())
                start = {
                    "type": "http.response.start",
                    "status": errors.status_of(error),
                    "headers": [*errors.headers_of(error), length],
                }
                await self.send(start)
                await self.send({"type": "http.response.body", "body": body})
            elif self._events and not self._stalled:
                body = b"data: " + errors.encoded(error) + b"\n\n"
                await self.send({"type": "http.response.body", "body": body})
        if not self.ended or self._stalled:
            self._hang_up()

    def _hang_up(self) -> None:
        if self._abort is not None:
            self._abort()


@asynccontextmanager
async def _in_time(seconds: float) -> AsyncIterator[None]:
    """Raises ResourceExhausted where what is waited for has not come after ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise ResourceExhausted(
            "body: it did not come in time; send it with the request", reason="STREAM_STALLED"
        ) from None


@asynccontextmanager
async def _watched(receive: Receive, answer: _Answer) -> AsyncIterator[None]:
    """Ends the call when its client goes."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a call is a task")

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not answer.ended:
            answer.left = True
            task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()


def _replay(body: bytes) -> Receive:
    """Gives a body that has been read; whoever asks on waits for ever."""
    sent = False

    async def receive() -> Any:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _metadata(headers: Mapping[str, str]) -> list[tuple[str, str | bytes]]:
    return [(calls.REQUEST_ID, headers[REQUEST_ID])] if REQUEST_ID in headers else []
