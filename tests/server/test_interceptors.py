"""The outermost layer, in front of a real server whose methods do as they are told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from google.rpc import error_details_pb2
from grpc import aio
from grpc_status import rpc_status

from mora_serve import errors
from mora_serve.access.audit import Audit
from mora_serve.access.door import TENANT, Door
from mora_serve.access.limits import Meter
from mora_serve.config import AccessConfig
from mora_serve.metrics import Metrics
from mora_serve.server import call as calls
from mora_serve.server.gate import Gate, State
from mora_serve.server.interceptors import CallInterceptor, Entrance
from mora_serve.server.status import DOMAIN, PUSHBACK

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
ERRORS = [
    errors.InvalidArgument("top_p: 7 is too large; use at most 1", field="top_p"),
    errors.NotFound("adapter: 'x' is not registered", field="adapter", reason="NO_ADAPTER"),
    errors.AlreadyExists("name: in use; set replace"),
    errors.FailedPrecondition("path: set adapters.root"),
    errors.ResourceExhausted("the queue is full; retry later", retry_after=0.25),
    errors.DeadlineExceeded("the deadline passed; allow more time"),
    errors.PermissionDenied("adapter: not yours"),
    errors.Unavailable("draining; ask another server", retry_after=1.5),
    errors.ConfigError("base.model: unsupported"),
]


class Server:
    """A server with one method of each kind; each runs ``self.act(text)`` for its request."""

    def __init__(self) -> None:
        self.act: Callable[[str], str] = str
        self.closed = asyncio.Event()
        self.metrics = Metrics("test")
        self.gate = Gate()
        self.gate.state = State.SERVING
        entrance = Entrance(Door(AccessConfig()), self.gate, Meter(), Audit(None))
        interceptor = CallInterceptor(self.metrics, entrance, stall_seconds=1.0)
        self.server = aio.server(interceptors=(interceptor,))
        codec = {
            "request_deserializer": StringValue.FromString,
            "response_serializer": StringValue.SerializeToString,
        }
        handlers = {
            kind: getattr(grpc, f"{kind}_rpc_method_handler")(getattr(self, kind), **codec)
            for kind in KINDS
        }
        generic = grpc.method_handlers_generic_handler("test.Service", handlers)
        self.server.add_generic_rpc_handlers((generic,))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def answer(self, text: str) -> StringValue:
        return StringValue(value=self.act(text))

    async def unary_unary(self, request: StringValue, context: Any) -> StringValue:
        return self.answer(request.value)

    async def unary_stream(self, request: StringValue, context: Any) -> AsyncIterator[StringValue]:
        try:
            for _ in range(int(request.value or 1)):
                yield self.answer(request.value)
        finally:
            self.closed.set()

    async def stream_unary(self, requests: Any, context: Any) -> StringValue:
        return self.answer("".join([r.value async for r in requests]))

    async def stream_stream(self, requests: Any, context: Any) -> AsyncIterator[StringValue]:
        async for request in requests:
            yield self.answer(request.value)


@pytest.fixture
async def server():
    server = Server()
    await server.server.start()
    async with aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        server.channel = channel
        yield server
    await server.server.stop(0)


async def run(server: Server, kind: str, data: bytes = b"", metadata=()) -> Any:
    """Make a call of any kind to its end; the call, its answers in ``.answers``."""
    call = getattr(server.channel, kind)(f"/test.Service/{kind}")
    request = iter([data]) if kind.startswith("stream") else data
    call = call(request, metadata=metadata, timeout=20)
    answers = [a async for a in call] if kind.endswith("stream") else [await call]
    call.answers = [StringValue.FromString(a).value for a in answers]
    return call


def raiser(error: Exception) -> Callable[[str], str]:
    def act(text: str) -> str:
        raise error

    return act


async def failure(server: Server, kind: str, **options: Any) -> aio.AioRpcError:
    with pytest.raises(aio.AioRpcError) as caught:
        await run(server, kind, **options)
    return caught.value


async def rest(call: Any) -> None:
    while await call.read() is not aio.EOF:
        pass


def details(error: aio.AioRpcError) -> dict[str, Any]:
    """The rich status's details by type."""
    found = {}
    for detail in rpc_status.from_call(error).details:
        name = detail.TypeName().rpartition(".")[2]
        detail.Unpack(message := getattr(error_details_pb2, name)())
        found[name] = message
    return found


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    async def test_an_answer_passes_through(self, server, kind):
        data = StringValue(value="2").SerializeToString()
        call = await run(server, kind, data)
        assert call.answers == ["2"] * (2 if kind == "unary_stream" else 1)

    async def test_the_request_id_is_echoed(self, server, kind):
        """The client's own id comes back in the initial metadata."""
        call = await run(server, kind, metadata=((calls.REQUEST_ID, "job-7/a"),))
        assert dict(await call.initial_metadata())[calls.REQUEST_ID] == "job-7/a"

    async def test_a_request_id_is_made(self, server, kind):
        ids = [dict(await (await run(server, kind)).initial_metadata()) for _ in range(2)]
        assert len({i[calls.REQUEST_ID] for i in ids}) == 2

    @pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
    async def test_an_error_keeps_code_message_and_details(self, server, kind, error):
        server.act = raiser(error)
        got = await failure(server, kind)
        assert (got.code().name, got.details()) == (error.code, error.message)
        found = details(got)
        assert (found["ErrorInfo"].reason, found["ErrorInfo"].domain) == (error.reason, DOMAIN)
        fields = [v.field for v in found["BadRequest"].field_violations] if error.field else []
        assert fields == ([error.field] if error.field else [])
        retry = found["RetryInfo"].retry_delay.ToMilliseconds() if error.retry_after else None
        assert retry == (error.retry_after * 1000 if error.retry_after else None)

    async def test_an_unforeseen_error_tells_only_the_request_id(self, server, kind, caplog):
        """Nothing of the exception reaches the client; all of it reaches the log."""
        server.act = raiser(RuntimeError("secret in /etc/passwd"))
        with caplog.at_level(logging.ERROR):
            got = await failure(server, kind, metadata=((calls.REQUEST_ID, "abc"),))
        assert got.code() is grpc.StatusCode.INTERNAL
        assert "abc" in got.details()
        assert "secret" not in got.details() + repr(got.trailing_metadata())
        assert "secret" in caplog.text
        assert "abc" in caplog.text

    async def test_bytes_that_are_no_message_are_the_clients_fault(self, server, kind):
        got = await failure(server, kind, data=b"\xff\xff\xff")
        assert got.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "bytes" in got.details()

    async def test_a_bad_tenant_is_refused(self, server, kind):
        got = await failure(server, kind, metadata=((TENANT, "../etc"),))
        assert got.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert TENANT in got.details()

    async def test_a_bad_request_id_is_refused(self, server, kind):
        got = await failure(server, kind, metadata=((calls.REQUEST_ID, "a b"),))
        assert got.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert calls.REQUEST_ID in got.details()

    async def test_a_call_works_after_a_failed_one(self, server, kind):
        server.act = raiser(ValueError())
        await failure(server, kind)
        server.act = str
        await run(server, kind)

    async def test_calls_are_counted_by_status(self, server, kind):
        await run(server, kind)
        server.act = raiser(errors.NotFound("no"))
        await failure(server, kind)
        for code in ("OK", "NOT_FOUND"):
            labels = {"method": f"/test.Service/{kind}", "code": code}
            count = server.metrics.registry.get_sample_value("mora_grpc_requests_total", labels)
            assert count == 1


async def test_each_call_sees_its_own_identity(server):
    """Concurrent calls do not see each other's request id or tenant."""
    server.act = lambda _: "{0.request_id} {0.tenant}".format(calls.current())
    made = [((calls.REQUEST_ID, f"r{i}"), (TENANT, f"t{i}")) for i in range(20)]
    done = await asyncio.gather(*(run(server, "unary_unary", metadata=m) for m in made))
    assert [c.answers for c in done] == [[f"r{i} t{i}"] for i in range(20)]


@pytest.mark.parametrize(("retry_after", "pushback"), [(0.25, "250"), (None, "-1")])
async def test_exhaustion_tells_when_to_come_back(server, retry_after, pushback):
    """In the form that grpc's own retry policies read; -1 forbids a retry."""
    server.act = raiser(errors.ResourceExhausted("full", retry_after=retry_after))
    got = await failure(server, "unary_unary")
    assert dict(got.trailing_metadata())[PUSHBACK] == pushback


async def test_a_retry_that_comes_too_late_is_not_waited_for(server):
    """The client learns at once why, instead of its deadline's end while it waits to try again."""
    server.act = raiser(errors.ResourceExhausted("full", retry_after=3600.0))
    call = server.channel.unary_unary(
        "/test.Service/unary_unary",
        request_serializer=StringValue.SerializeToString,
        response_deserializer=StringValue.FromString,
    )
    with pytest.raises(aio.AioRpcError) as caught:
        await call(StringValue(value="x"), timeout=60)
    assert dict(caught.value.trailing_metadata())[PUSHBACK] == "-1"
    assert details(caught.value)["RetryInfo"].retry_delay.seconds == 3600


async def test_a_long_message_still_fits_the_metadata(server):
    """An error that quotes a huge value is cut rather than lost."""
    server.act = raiser(errors.InvalidArgument("x" * 100_000, field="prompt"))
    got = await failure(server, "unary_unary")
    assert got.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(got)["BadRequest"].field_violations[0].field == "prompt"


async def test_a_client_that_reads_nothing_is_given_up(server):
    """The answer's producer is closed after the stall limit; the client then learns why."""
    server.act = lambda _: "x" * 500_000
    call = server.channel.unary_stream("/test.Service/unary_stream")(
        StringValue(value="1000").SerializeToString()
    )
    await call.read()
    async with asyncio.timeout(20):
        await server.closed.wait()
        with pytest.raises(aio.AioRpcError) as caught:
            await rest(call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details(caught.value)["ErrorInfo"].reason == "STREAM_STALLED"


async def test_a_cancelled_stream_closes_its_producer(server):
    server.act = lambda _: "x" * 500_000
    call = server.channel.unary_stream("/test.Service/unary_stream")(
        StringValue(value="1000").SerializeToString()
    )
    await call.read()
    call.cancel()
    async with asyncio.timeout(20):
        await server.closed.wait()


async def test_an_unknown_method_is_unimplemented(server):
    with pytest.raises(aio.AioRpcError) as caught:
        await server.channel.unary_unary("/test.Service/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("state", [State.LOADING, State.DRAINING])
@pytest.mark.parametrize("kind", KINDS)
async def test_nobody_is_let_in_before_and_after_serving(server, kind, state):
    """Clients are told to come back, or to go elsewhere."""
    server.gate.state = state
    got = await failure(server, kind)
    assert got.code() is grpc.StatusCode.UNAVAILABLE
    assert details(got)["ErrorInfo"].reason == state.name
    assert (PUSHBACK in dict(got.trailing_metadata())) == (state is State.LOADING)


@pytest.mark.parametrize("kind", KINDS)
async def test_methods_of_services_to_come_are_unavailable(server, kind):
    """While the model loads, its services are not there yet: that is no wrong method name."""
    server.gate.state = State.LOADING
    call = getattr(server.channel, kind)("/test.Later/Method")
    # A stream sends nothing: a message on its way to a call that is over is an error of its own.
    call = call(timeout=20) if kind.startswith("stream") else call(b"", timeout=20)
    assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_draining_waits_for_those_inside(server):
    """A stream that is under way goes on to its end, and draining ends with it."""
    call = server.channel.stream_stream("/test.Service/stream_stream")()
    await call.write(StringValue(value="a").SerializeToString())
    await call.read()
    assert not await server.gate.drain(0.05)
    drained = asyncio.ensure_future(server.gate.drain(20))
    await call.write(StringValue(value="b").SerializeToString())
    assert StringValue.FromString(await call.read()).value == "b"
    assert not drained.done()
    await call.done_writing()
    assert await drained
    assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("kind", KINDS)
async def test_a_call_that_is_ended_while_its_answer_begins_is_told_so(server, kind):
    def act(text: str) -> str:
        asyncio.get_running_loop().call_soon(server.gate.fail)
        return text

    server.act = act
    error = await failure(server, kind)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert details(error)["ErrorInfo"].reason == "ENGINE_FAILED"


@pytest.mark.parametrize("kind", ["stream_unary", "stream_stream"])
async def test_a_client_that_stops_sending_is_given_up(server, kind):
    """Whichever call of many messages it has opened."""
    call = getattr(server.channel, kind)(f"/test.Service/{kind}")(timeout=20)
    await call.write(StringValue(value="a").SerializeToString())
    with pytest.raises(aio.AioRpcError) as caught:
        await (rest(call) if hasattr(call, "read") else call)
    assert details(caught.value)["ErrorInfo"].reason == "STREAM_STALLED"


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
class TestTheOnlyMessage:
    """Clients of any language can make a call of one message as one of many, or of none."""

    def call(self, server, kind, *messages):
        many = kind.replace("unary_", "stream_", 1)
        return getattr(server.channel, many)(f"/test.Service/{kind}")(iter(messages), timeout=20)

    async def end(self, call):
        try:
            await rest(call) if hasattr(call, "read") else await call
        except aio.AioRpcError as e:
            return e
        return None

    async def test_a_call_without_one_is_refused(self, server, kind):
        got = await self.end(self.call(server, kind))
        assert got.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details(got)["ErrorInfo"].reason == "NO_MESSAGE"

    async def test_what_follows_it_is_not_looked_at(self, server, kind):
        good = StringValue(value="1").SerializeToString()
        assert await self.end(self.call(server, kind, good, b"\xff")) is None

    async def test_it_has_to_come_in_time(self, server, kind):
        """A client that opens calls and says nothing more holds none of them for long."""

        async def silence():
            await asyncio.Event().wait()
            yield b""

        many = kind.replace("unary_", "stream_", 1)
        call = getattr(server.channel, many)(f"/test.Service/{kind}")(silence(), timeout=20)
        got = await self.end(call)
        assert got.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(got)["ErrorInfo"].reason == "STREAM_STALLED"

    async def test_nobody_sends_one_where_nobody_is_let_in(self, server, kind):
        """A refusal does not wait for the message, however large."""
        server.gate.state = State.DRAINING

        async def silence():
            await asyncio.Event().wait()
            yield b""

        many = kind.replace("unary_", "stream_", 1)
        call = getattr(server.channel, many)(f"/test.Service/{kind}")(silence(), timeout=20)
        assert (await self.end(call)).code() is grpc.StatusCode.UNAVAILABLE
