"""Health: who asks is answered, and who does not listen holds up nobody."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mora_serve.client import Client
from mora_serve.demo.process import ServerProcess
from mora_serve.errors import NotFound
from mora_serve.server import interceptors, strangers
from mora_serve.server.health import HealthServicer
from mora_serve.server.services import SERVICES
from tests.server.conftest import running, wait_for
from tests.server.process import NOT_SERVING, SERVING

UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS = 0, 1, 4
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW_SIZE = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name: str, value: str) -> bytes:
    """As HPACK's literal that is not indexed."""
    texts = (text.encode() for text in (name, value))
    return b"\0" + b"".join(bytes([len(text)]) + text for text in texts)


def headers(method: str) -> bytes:
    pairs = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "x"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    return b"".join(header(*pair) for pair in pairs)


@contextlib.contextmanager
def deaf_watchers(port: int, count: int) -> Iterator[socket.socket]:
    """A connection with a window of 0: whatever is written to its calls is never sent."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(PREFACE)
        connection.sendall(frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0)))
        for stream in range(1, 2 * count, 2):
            block = headers("/grpc.health.v1.Health/Watch")
            connection.sendall(frame(HEADERS, END_HEADERS, stream, block))
            connection.sendall(frame(DATA, END_STREAM, stream, b"\0" * 5))
        yield connection


def watching(serving) -> int:
    return serving.server._entrance.strangers.watches.held


class TestWatchersThatDoNotRead:
    def test_do_not_hold_the_status(self, configure):
        """The health of a server that stops is told to all others, and the stop ends in time."""
        with running(configure()) as serving, deaf_watchers(serving.server.port, 20):
            wait_for(lambda: watching(serving) == 20)
            with channel_to(serving) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                heard = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
                assert next(heard).status == SERVING
                stopping = asyncio.run_coroutine_threadsafe(serving.server.stop(), serving.loop)
                assert next(heard).status == NOT_SERVING
                heard.cancel()
                stopping.result(60)

    def test_are_given_up(self, configure):
        config = configure(engine={"stall_seconds": 0.5})
        with running(config) as serving, deaf_watchers(serving.server.port, 3):
            wait_for(lambda: watching(serving) == 3)
            wait_for(lambda: watching(serving) == 0)

    def test_a_process_with_them_ends_when_told(self, root):
        flags = {"base.model": root / "base", "base.quantization": "none"}
        flags |= {"server.drain_seconds": 5}
        with ServerProcess(flags) as process:
            with Client(process.address) as client:
                process.wait_until_ready(client)
                with deaf_watchers(int(process.address.rpartition(":")[2]), 20):
                    assert client.generate("hello", base=True, max_tokens=1).tokens
                    assert process.stop() == 0
            assert "threads are still at work" not in process.whole_log


class TestWhatStrangersHold:
    """Health needs no key: what such calls take is bounded by how many there may be."""

    @pytest.fixture
    def few(self, monkeypatch):
        """Little room, so that a test fills it."""
        monkeypatch.setattr(strangers, "WATCHES", 6)
        monkeypatch.setattr(strangers, "REQUESTS", 4)
        monkeypatch.setattr(interceptors, "REQUEST_SECONDS", 60.0)

    @contextlib.contextmanager
    def silent_calls(self, channel: grpc.Channel, count: int) -> Iterator[list[grpc.Future]]:
        """Checks whose only message does not come."""
        over = threading.Event()

        def messages() -> Iterator[bytes]:
            over.wait(60)
            yield from ()

        call = channel.stream_unary("/grpc.health.v1.Health/Check")
        try:
            yield [call.future(messages()) for _ in range(count)]
        finally:
            over.set()

    def outcome(self, channel: grpc.Channel) -> str:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        except grpc.RpcError as e:
            return e.code().name
        return "OK"

    def test_one_host_watches_with_half_of_the_room(self, few, configure):
        with running(configure()) as serving, channel_to(serving) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            calls = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
            for call in calls:
                assert next(call).status == SERVING
            more = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
            with pytest.raises(grpc.RpcError) as caught:
                next(more)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "this host has as many health watches" in caught.value.details()
            assert self.outcome(channel) == "OK"  # what asks once is not refused for them
            with serving.server._entrance.strangers.watching(Peer("ipv4:10.0.0.1:4242")):
                pass  # there is room for another host
            for call in calls:
                call.cancel()
            wait_for(lambda: watching(serving) == 0)

    def test_few_requests_come_in_at_the_same_time_and_the_slowest_gives_way(self, few, configure):
        """As many of the largest messages are all the memory that they can take; probes get in."""
        with running(configure()) as serving, channel_to(serving) as channel:
            here = serving.server._entrance.strangers
            with self.silent_calls(channel, 4) as calls:
                wait_for(lambda: here.arriving == 4)
                assert [self.outcome(channel) for _ in range(3)] == ["OK"] * 3
                wait_for(lambda: any(call.done() for call in calls))
                (gone,) = (call for call in calls if call.done())
                assert gone.exception(30).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert here.arriving == 3
            wait_for(lambda: all(call.done() for call in calls))

    def test_a_request_has_to_come_soon(self, monkeypatch, configure):
        monkeypatch.setattr(interceptors, "REQUEST_SECONDS", 0.2)
        with (
            running(configure()) as serving,
            channel_to(serving) as channel,
            self.silent_calls(channel, 1) as (call,),
        ):
            assert call.exception(30).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.1:4242", "10.0.0.1"),
        ("ipv6:%5B2001:db8::1%5D:4242", "2001:db8::/64"),
        ("ipv6:[2001:db8::ffff:1]:17", "2001:db8::/64"),
        ("ipv6:%5B::ffff:10.0.0.1%5D:4242", "10.0.0.1"),
        ("unix:", "unix:"),
    ],
)
def test_a_host_is_an_address_or_a_network_of_them(peer: str, host: str) -> None:
    assert strangers.host_of(peer) == host


def channel_to(serving) -> grpc.Channel:
    return grpc.insecure_channel(serving.server.address)


class Peer:
    def __init__(self, address: str) -> None:
        self._address = address

    def peer(self) -> str:
        return self._address


class TestServicer:
    """The servicer by itself."""

    async def test_what_is_not_served_is_unknown(self):
        servicer = HealthServicer(SERVICES)
        request = health_pb2.HealthCheckRequest(service="none")
        with pytest.raises(NotFound):
            await servicer.Check(request, None)
        assert (await anext(servicer.Watch(request, None))).status == UNKNOWN
        assert servicer._services == {"", *SERVICES}

    async def test_a_slow_reader_gets_the_newest(self):
        """And no status twice."""
        servicer = HealthServicer(())
        watching = servicer.Watch(health_pb2.HealthCheckRequest(), None)
        assert (await anext(watching)).status == NOT_SERVING
        for serving in (True, False, True):
            servicer.set(serving=serving)
        assert (await anext(watching)).status == SERVING
        following = asyncio.ensure_future(anext(watching))
        await asyncio.sleep(0)
        servicer.set(serving=True)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not following.done()
        servicer.set(serving=False)
        assert (await following).status == NOT_SERVING

    async def test_the_end_is_the_end(self):
        servicer = HealthServicer(())
        servicer.set(serving=True)
        servicer.end()
        servicer.set(serving=True)
        answer = await servicer.Check(health_pb2.HealthCheckRequest(), None)
        assert answer.status == NOT_SERVING

    async def test_a_watch_keeps_no_request(self):
        """It may be large, and its call long."""
        servicer = HealthServicer(())
        watching = servicer.Watch(health_pb2.HealthCheckRequest(service="x" * 1000), None)
        await anext(watching)
        assert "request" not in watching.ag_frame.f_locals
