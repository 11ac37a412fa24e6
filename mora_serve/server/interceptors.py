"""The outermost layer of every call: its identity, its errors, its duration.

A ``MoraError`` becomes its status (see ``status.py``); anything else is logged, and the client
learns the request id.

An answer carries the request id in its initial metadata, an error in its trailing metadata:
initial metadata sent ahead of an error would commit the call, and no client would retry it.

To grpc every method takes a stream: a call's only message is read here, once the call is let in.
grpc itself would read it before, however large, and leave a call that has none without an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from mora_serve.access.audit import Audit
from mora_serve.access.door import HEALTH, Caller, Denied, Door
from mora_serve.access.limits import Meter
from mora_serve.access.roles import ALLOWED
from mora_serve.errors import (
    Internal,
    InvalidArgument,
    MoraError,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from mora_serve.metrics import Metrics
from mora_serve.server import call as calls
from mora_serve.server import logs
from mora_serve.server.gate import Gate, State
from mora_serve.server.status import Context, Metadata, abort
from mora_serve.server.strangers import REQUEST_SECONDS, Strangers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entrance:
    """What is between the clients and the methods: who is let in, how many, and who is told."""

    door: Door
    gate: Gate
    meter: Meter
    audit: Audit
    strangers: Strangers = field(default_factory=Strangers)


class _Malformed:
    """Stands for a message whose bytes do not parse."""


class CallInterceptor(aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in stubs only
    """Wraps every method, of every kind; ``stall_seconds`` bounds one write, or one read.

    A call is let in by its metadata alone: one that is not is answered before a byte of its request
    is read. grpc's own services (health, reflection) pass whatever the gate's state. Health needs
    no key; how many ask for it is bounded instead. ``apart``: administrators' calls are served on
    another address. ``log_calls`` logs a line for each call that ends.
    """

    def __init__(
        self,
        metrics: Metrics,
        entrance: Entrance,
        stall_seconds: float,
        *,
        log_calls: bool = False,
        apart: bool = False,
    ) -> None:
        self._metrics = metrics
        self._log_calls = log_calls
        self._door = entrance.door
        self._gate = entrance.gate
        self._meter = entrance.meter
        self._audit = entrance.audit
        self._strangers = entrance.strangers
        self._stall_seconds = stall_seconds
        self._apart = apart

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler inside this layer; None where there is no such method."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        metadata = tuple(handler_call_details.invocation_metadata or ())
        request_id, usable = calls.request_id(metadata)
        try:
            if not usable:
                raise InvalidArgument(
                    f"metadata {calls.REQUEST_ID}: use at most 128 letters, digits and '.', '_', "
                    "':', '/', '-', starting with a letter or a digit, or leave it out",
                    field=calls.REQUEST_ID,
                )
            given = dict(metadata)
            caller = self._admit(method, request_id, given)
            call = calls.Call(request_id, caller, parent=calls.parent_of(given))
        except MoraError as e:
            return self._refusing(method if handler is not None else "unknown", request_id, e)
        if handler is None:
            if self._gate.state is not State.LOADING:
                return None
            # The services are added when the model has loaded. Until then a method cannot be
            # told from one that does not exist; a handler of this kind answers all of them.
            handler, method = grpc.stream_stream_rpc_method_handler(_nothing), "unknown"
        if handler.response_streaming:
            return self._streaming(method, handler, call)
        return self._unary(method, handler, call)

    def _admit(self, method: str, request_id: str, metadata: dict[str, Any]) -> Caller:
        if method.startswith(HEALTH):
            return Caller()
        try:
            return self._door.admit(method, metadata, self._apart)
        except (Unauthenticated, PermissionDenied) as e:
            self._denied(method, request_id, e.caller if isinstance(e, Denied) else Caller(""), e)
            raise

    def _denied(self, method: str, request_id: str, caller: Caller, error: MoraError) -> None:
        self._audit.denied(
            request_id=request_id,
            tenant=caller.tenant,
            key=caller.key,
            method=method if method in ALLOWED else "unknown",
            reason=error.reason,
        )

    def _refusing(self, method: str, request_id: str, error: MoraError) -> Any:
        """A handler that answers with an error. Of this kind, it reads nothing of the request."""

        async def refuse(_: Any, context: Context) -> None:
            self._metrics.rpc(method, error.code, 0.0)
            self._metrics.refused(error)
            if self._log_calls:
                # What strangers send does not fill the log.
                quiet = self._door.locked and not isinstance(error, Denied)
                logs.ended(method, error.code, 0.0, request_id, quiet=quiet)
            await abort(context, error, ((calls.REQUEST_ID, request_id),))

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _unary(self, method: str, handler: Any, call: calls.Call) -> Any:
        many = handler.request_streaming
        inner, take = (
            (handler.stream_unary, self._all) if many else (handler.unary_unary, self._one(method))
        )

        async def behaviour(requests: Any, context: Context) -> Any:
            async def run(echo: Metadata) -> Any:
                response = await inner(await take(requests, context), context)
                await _begin(context, echo)
                return response

            return await self._guard(method, context, call, run)

        return grpc.stream_unary_rpc_method_handler(
            behaviour, _tolerant(handler.request_deserializer), handler.response_serializer
        )

    def _streaming(self, method: str, handler: Any, call: calls.Call) -> Any:
        many = handler.request_streaming
        inner, take = (
            (handler.stream_stream, self._all)
            if many
            else (handler.unary_stream, self._one(method))
        )

        async def behaviour(requests: Any, context: Context) -> None:
            async def run(echo: Metadata) -> None:
                answer = inner(await take(requests, context), context)
                if not hasattr(answer, "__aiter__"):  # it writes to the context itself
                    await answer
                    return
                started = False
                async with aclosing(answer):
                    async for message in answer:
                        if not started:
                            await _begin(context, echo)
                            started = True
                        await self._write(context, message)

            await self._guard(method, context, call, run)

        return grpc.stream_stream_rpc_method_handler(
            behaviour, _tolerant(handler.request_deserializer), handler.response_serializer
        )

    def _one(self, method: str) -> Callable[[Any, Context], Awaitable[Any]]:
        return self._of_stranger if method.startswith(HEALTH) else self._only

    async def _of_stranger(self, requests: Any, context: Context) -> Any:
        """The only message of a call that needs no key."""
        seconds = min(REQUEST_SECONDS, self._stall_seconds)
        return await self._received(context, self._strangers.arrival(seconds))

    async def _only(self, requests: Any, context: Context) -> Any:
        """The only message of a call; those after it are not read."""
        return await self._received(context, asyncio.timeout(self._stall_seconds))

    async def _received(
        self, context: Context, time_for_it: AbstractAsyncContextManager[object]
    ) -> Any:
        try:
            async with time_for_it:
                request = await context.read()
        except TimeoutError:
            raise ResourceExhausted(
                "request: its message did not come in time; send it with the call",
                reason="STREAM_STALLED",
            ) from None
        if request is aio.EOF:  # type: ignore[attr-defined]  # missing stub
            raise InvalidArgument(
                "request: the call has no message; send one of its type, which may be empty",
                reason="NO_MESSAGE",
            )
        return _checked(request)

    async def _all(self, requests: Any, context: Context) -> AsyncIterator[Any]:
        """The messages of a call that takes many."""
        return self._each(requests)

    async def _each(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        while True:
            try:
                async with asyncio.timeout(self._stall_seconds):
                    request = await anext(requests)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise ResourceExhausted(
                    f"stream: nothing came for {self._stall_seconds:g} seconds; send the messages "
                    "one after another, from the start",
                    reason="STREAM_STALLED",
                ) from None
            yield _checked(request)

    async def _write(self, context: Context, message: Any) -> None:
        try:
            async with asyncio.timeout(self._stall_seconds):
                await context.write(message)
        except TimeoutError:
            raise ResourceExhausted(
                f"stream: the client read nothing for {self._stall_seconds:g} seconds; read "
                "messages as they come, or use Generate",
                reason="STREAM_STALLED",
            ) from None

    async def _guard(
        self,
        method: str,
        context: Context,
        call: calls.Call,
        run: Callable[[Metadata], Awaitable[Any]],
    ) -> Any:
        """Run a call under its identity; end it with a status when it fails."""
        start = time.monotonic()
        request_id, caller = call.request_id, call.caller
        echo = ((calls.REQUEST_ID, request_id),)
        outcome = "OK"
        try:
            calls.enter(call)
            with ExitStack() as inside:
                if method == f"{HEALTH}Watch":
                    inside.enter_context(self._strangers.watching(context))
                elif not method.startswith(HEALTH):
                    if not method.startswith("/grpc."):
                        inside.enter_context(self._gate.passing())
                    inside.enter_context(self._meter.passing(caller.tenant, caller.limits))
                return await run(echo)
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            raise
        except aio.InternalError:  # what was to be sent does not reach the client, who has gone
            outcome = "CANCELLED"
            raise asyncio.CancelledError from None
        except aio.AbortError:  # a servicer of grpc's own (health) has sent its status
            outcome = getattr(context.code(), "name", "UNKNOWN")
            raise
        except MoraError as e:
            # Its traceback would hold this frame, which holds it: what the call had open would stay
            # open until the collector comes by.
            error = e.with_traceback(None)
            outcome = e.code
            if isinstance(e, PermissionDenied):
                self._denied(method, request_id, caller, e)
        except NotImplementedError:  # of the base of a generated servicer
            error = Unimplemented(f"method: {method} is none of this server's; see its reflection")
            outcome = error.code
        except Exception:
            log.exception("request %s: %s failed", request_id, method)
            error = Internal(f"internal error; the server's log has it as request {request_id}")
            outcome = error.code
        finally:
            seconds = time.monotonic() - start
            self._metrics.rpc(method, outcome, seconds)
            if self._log_calls:
                logs.ended(method, outcome, seconds, request_id)
        self._metrics.refused(error)
        return await abort(context, error, echo)


async def _begin(context: Context, echo: Metadata) -> None:
    """Send what comes before an answer, whole even where the call is ended meanwhile.

    grpc takes metadata for unsent whose sending was cancelled. It would send it once more, with the
    error, which fails: the client would hear nothing.
    """
    sending = asyncio.ensure_future(context.send_initial_metadata(echo))
    try:
        await asyncio.shield(sending)
    except asyncio.CancelledError:
        with contextlib.suppress(aio.InternalError):  # the client has gone
            await sending
        raise


async def _nothing(requests: Any, context: Any) -> None:
    """The method that stands for those of services still to come; the gate lets no call in."""
    raise Unavailable("server: it is loading; retry", reason="LOADING", retry_after=1.0)


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserialiser that never raises: grpc would send the exception's text to the client."""
    if deserialize is None:
        return None

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Malformed()

    return parse


def _checked(request: Any) -> Any:
    """The request. Raises InvalidArgument for bytes that do not parse."""
    if isinstance(request, _Malformed):
        raise InvalidArgument("request: its bytes are not a message of this call's type")
    return request
