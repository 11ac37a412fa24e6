"""A server that is told to stop: every call ends with an answer or with UNAVAILABLE, in time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
import time

import grpc
import pytest

from mora_serve import errors
from mora_serve.client import connection
from mora_serve.server.ending import Times, left
from mora_serve.server.gate import Gate, State
from mora_serve.v1 import generation_pb2, generation_pb2_grpc
from tests.server.conftest import LONGEST, OUTLASTING, running, wait_for
from tests.server.process import server_process

LONG = {"base": True, **OUTLASTING}
SLOW = "slow " * 2000  # long enough to be tokenised on a thread


def slow_steps(serving, seconds: float = 0.02) -> None:
    """Answers then outlast any time to stop."""
    runner = serving.server._assembly.engine.runner
    run = runner.run

    def slow(batch):
        time.sleep(seconds)
        return run(batch)

    runner.run = slow


def inside(serving) -> int:
    return len(serving.server._gate._inside)


def narrow_channel(serving) -> grpc.Channel:
    """A connection that takes in few bytes that nobody reads."""
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 << 10))
    return grpc.insecure_channel(serving.server.address, options)


def unread_stream(channel) -> grpc.Call:
    """A stream of more bytes than its connection takes in, of which only the beginning is read."""
    request = generation_pb2.GenerateStreamRequest(
        prompt=generation_pb2.Prompt(text="hello"),
        sampling=generation_pb2.SamplingParams(max_tokens=LONGEST, ignore_eos=True, logprobs=20),
        selection=generation_pb2.Selection(base=generation_pb2.BaseOnly()),
    )
    call = generation_pb2_grpc.GenerationServiceStub(channel).GenerateStream(request, timeout=120)
    next(call)
    return call


def test_what_cannot_finish_is_told_so_and_not_cancelled(configure):
    """Streams, whole answers, those in line, and calls that wait for a thread."""
    config = configure(server={"drain_seconds": 2.0}, engine={"max_batch": 4})
    with (
        running(config) as serving,
        serving.client() as client,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        client.register_adapter("rev", "rev")
        slow_steps(serving)
        registry, go_on = serving.server._assembly.registry, threading.Event()
        registry.pin = lambda *args, **kwargs: go_on.wait(60)
        calls = [threads.submit(client.generate, "hello", **LONG) for _ in range(3)]
        calls += [threads.submit(list, client.stream("hello", **LONG)) for _ in range(4)]
        calls.append(threads.submit(client.pin_adapter, "rev"))
        wait_for(lambda: inside(serving) == len(calls))
        stopping = asyncio.run_coroutine_threadsafe(serving.server.stop(), serving.loop)
        for call in calls:
            with pytest.raises(errors.Unavailable):
                call.result(60)
        go_on.set()
        stopping.result(60)


def test_a_call_that_is_ended_has_the_reason(configure):
    config = configure(server={"drain_seconds": 0.5})
    with running(config) as serving, grpc.insecure_channel(serving.server.address) as channel:
        slow_steps(serving)
        request = generation_pb2.GenerateRequest(
            prompt=generation_pb2.Prompt(text="hello"),
            sampling=generation_pb2.SamplingParams(max_tokens=LONGEST, ignore_eos=True),
            selection=generation_pb2.Selection(base=generation_pb2.BaseOnly()),
        )
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate.future(request)
        wait_for(lambda: inside(serving) == 1)
        serving.end()
        error = connection.error_of(call.exception(60), "")
        assert (error.code, error.reason) == ("UNAVAILABLE", "DRAINING")


def test_a_client_that_does_not_read_does_not_hold_the_end(configure):
    """Its pages are free at once, and the server stops in its time."""
    config = configure(server={"drain_seconds": 2.0})
    with running(config) as serving, narrow_channel(serving) as channel:
        unread = [unread_stream(channel) for _ in range(3)]
        engine = serving.server._assembly.engine
        wait_for(lambda: engine.stats().running == 0 and inside(serving) == 3, 60)
        started = time.monotonic()
        asyncio.run_coroutine_threadsafe(serving.server.stop(), serving.loop).result(60)
        assert time.monotonic() - started < 20
        assert inside(serving) == 0
        for call in unread:
            with pytest.raises(grpc.RpcError):
                list(call)


@pytest.mark.parametrize(
    ("fault", "logged"),
    [("slow-tokenizer", "1 calls have not ended in time"), ("slow-close", "without them")],
)
def test_what_hangs_does_not_hold_the_process(root, fault, logged):
    """A thread, or what is closed at the end: callers are sent elsewhere, the status is 0."""
    flags = {"server.drain_seconds": 4}
    with (
        server_process(root, fault, **flags) as (process, client),
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        client.wait_until_ready(60)
        call = threads.submit(client.generate, SLOW, base=True, **OUTLASTING)
        assert client.generate("hello", base=True, max_tokens=1).usage.completion_tokens == 1
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        with pytest.raises(errors.MoraError):  # too long for the context, where it is tokenised
            call.result(60)
        assert process.wait(60) == 0
        assert time.monotonic() - started < 40
    log = process.stderr.read().decode()
    assert logged in log
    assert "Traceback" not in log


def test_the_parts_of_a_stop_are_within_its_time():
    for seconds in (3.0, 5.0, 30.0, 600.0):
        times = Times.of(seconds)
        end = time.monotonic() + seconds
        assert times.finishing < times.writing
        assert times.writing + times.last < end
        assert left(times.finishing) > 0.6 * seconds


class TestGate:
    """The door itself, with calls that wait for whatever a test says."""

    async def call(self, gate: Gate, wait: asyncio.Event) -> str:
        try:
            with gate.passing():
                await wait.wait()
        except errors.Unavailable as e:
            return e.reason
        return "answered"

    async def test_those_inside_are_expelled_and_the_next_are_not_let_in(self):
        gate, never = Gate(), asyncio.Event()
        gate.state = State.SERVING
        calls = [asyncio.ensure_future(self.call(gate, never)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not await gate.drain(0.01)
        assert gate.expel() == 3
        assert await gate.empty(10)
        assert await asyncio.gather(*calls) == ["DRAINING"] * 3
        assert await self.call(gate, never) == "DRAINING"

    async def test_a_client_that_cancels_is_cancelled(self):
        gate, never = Gate(), asyncio.Event()
        gate.state = State.SERVING
        call = asyncio.ensure_future(self.call(gate, never))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await gate.empty(10)

    async def test_whoever_is_done_when_expelled_is_answered_or_told(self):
        """Never cancelled: the wait may have ended at the same moment."""
        gate, now = Gate(), asyncio.Event()
        gate.state = State.SERVING
        call = asyncio.ensure_future(self.call(gate, now))
        await asyncio.sleep(0)
        now.set()
        gate.expel()
        assert await call in ("LOADING", "DRAINING", "answered")

    async def test_after_a_failure_it_stays_shut(self):
        gate, never = Gate(), asyncio.Event()
        gate.state = State.SERVING
        call = asyncio.ensure_future(self.call(gate, never))
        await asyncio.sleep(0)
        gate.fail()
        assert await call == "ENGINE_FAILED"
        assert await gate.drain(10)
        assert await self.call(gate, never) == "ENGINE_FAILED"
