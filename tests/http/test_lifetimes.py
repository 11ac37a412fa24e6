"""Calls that end otherwise than by their answers: clients that go, servers that stop, deadlines."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mora_serve.server.app import MoraServer
from tests.http.conftest import asking, openai_of, url, with_http
from tests.server.conftest import LONGEST, Running, running, wait_for
from tests.server.test_drain import slow_steps

LONG = {"model": "base", "prompt": "hello", "max_tokens": LONGEST, "ignore_eos": True}


def stats(serving: Running) -> Any:
    return serving.server._assembly.engine.stats()  # type: ignore[union-attr]


def idle(serving: Running) -> bool:
    """Nothing runs, nobody is inside, no page is used but by the prefix cache."""
    now = stats(serving)
    return not (now.running or now.waiting or serving.server._gate._inside)


@pytest.fixture(scope="module")
def slow(root: Path) -> Any:
    """A server whose answers outlast what a test does beside them."""
    config = with_http(root, engine={"max_batch": 8, "prefix_cache": False, "stall_seconds": 1.0})
    with running(config) as serving:
        slow_steps(serving, 0.01)
        yield serving


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_pages(slow: Running, stream: bool) -> None:
    """In the middle of a stream, or while it waits for a whole answer."""
    with asking(slow) as http:
        request = http.build_request("POST", "/v1/completions", json={**LONG, "stream": stream})
        if stream:
            answer = http.send(request, stream=True)
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            wait_for(lambda: stats(slow).kv_pages_used)
            answer.close()
        else:
            with concurrent.futures.ThreadPoolExecutor(1) as threads:
                gone = socket.create_connection(("127.0.0.1", slow.server.http_port))
                body = json.dumps(LONG).encode()
                gone.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
                    b"content-type: application/json\r\n"
                    + f"content-length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                threads.submit(wait_for, lambda: stats(slow).running).result()
                gone.close()
    wait_for(lambda: idle(slow))
    assert stats(slow).kv_pages_used == 0


def test_a_client_that_does_not_read_is_ended(slow: Running) -> None:
    """What it has not read fills its connection; then it has ``engine.stall_seconds``."""
    body = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()
    listening = slow.server._http._server._socket  # type: ignore[union-attr]
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of what it accepts as well
    with socket.socket() as unread:
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(("127.0.0.1", slow.server.http_port))
        unread.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_for(lambda: stats(slow).running)
        wait_for(lambda: idle(slow), 60)
        assert stats(slow).kv_pages_used == 0
        wait_for(lambda: connections(slow) == 0)
    metrics = httpx.get(f"{url(slow)}/metrics").text
    name = 'mora_grpc_requests_total{code="RESOURCE_EXHAUSTED",method="/v1/completions"}'
    assert name in metrics


def test_a_body_has_to_come_in_time_as_a_whole(slow: Running) -> None:
    """Whoever sends a byte now and then has no more time than whoever sends none."""
    with socket.create_connection(("127.0.0.1", slow.server.http_port), timeout=30) as drip:
        drip.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n"
        )
        answer, start = b"", time.monotonic()
        drip.settimeout(0.2)
        while not answer and time.monotonic() < start + 30:
            drip.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                answer = drip.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408 ")


def connections(serving: Running) -> int:
    return len(serving.server._http._server._uvicorn.server_state.connections)  # type: ignore[union-attr]


def test_a_deadline_is_a_gateway_timeout_that_is_not_retried(slow: Running) -> None:
    headers = {"x-request-timeout": "0.2"}
    with asking(slow, **headers) as http:
        answer = http.post("/v1/completions", json=LONG)
        assert answer.status_code == 504
        assert answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["code"] == "deadline_exceeded"
    with openai_of(slow, default_headers=headers) as client:
        more = {"extra_body": {"ignore_eos": True}, "max_tokens": LONGEST}
        stream = client.completions.create(model="base", prompt="x", stream=True, **more)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "deadline_exceeded"  # within the stream
    wait_for(lambda: idle(slow))


def test_a_full_line_is_429_and_comes_with_a_time(root: Path) -> None:
    with running(with_http(root, engine={"max_batch": 1, "max_queue": 1})) as serving:
        slow_steps(serving)
        with asking(serving) as http, concurrent.futures.ThreadPoolExecutor(2) as threads:
            streams = []
            for there in (lambda: stats(serving).running, lambda: stats(serving).waiting):
                body = {**LONG, "stream": True}
                request = http.build_request("POST", "/v1/completions", json=body)
                streams.append(http.send(request, stream=True))
                wait_for(there)
            answer = threads.submit(http.post, "/v1/completions", json=LONG).result()
            assert answer.status_code == 429
            assert float(answer.headers["retry-after"]) > 0
            for stream in streams:
                stream.close()


def test_a_stop_ends_what_cannot_finish_and_tells_it_so(root: Path) -> None:
    """Whole answers get 503, streams an error as their last event; new calls 503 meanwhile."""
    config = with_http(root, server={"drain_seconds": 2.0})
    with running(config) as serving, concurrent.futures.ThreadPoolExecutor(4) as threads:
        slow_steps(serving)

        def streamed() -> str:
            with asking(serving) as http:
                return http.post("/v1/completions", json={**LONG, "stream": True}).text

        def whole() -> httpx.Response:
            with asking(serving) as http:
                return http.post("/v1/completions", json=LONG)

        streaming, waiting = threads.submit(streamed), threads.submit(whole)
        wait_for(lambda: len(serving.server._gate._inside) == 2)
        stopping = asyncio.run_coroutine_threadsafe(serving.server.stop(), serving.loop)
        wait_for(lambda: serving.server._gate.state.value == "draining")
        late = whole()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        with asking(serving) as http:
            assert http.get("/healthz").status_code == 503
        answer = waiting.result(60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        *_, last = streaming.result(60).strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
        stopping.result(60)


def test_a_stop_waits_for_what_can_finish(root: Path) -> None:
    with running(with_http(root)) as serving, concurrent.futures.ThreadPoolExecutor(1) as threads:
        slow_steps(serving, 0.005)

        def streamed() -> str:
            with asking(serving) as http:
                body = {**LONG, "stream": True, "max_tokens": 100}
                return http.post("/v1/completions", json=body).text

        answer = threads.submit(streamed)
        wait_for(lambda: stats(serving).running)
        start = time.monotonic()
        asyncio.run_coroutine_threadsafe(serving.server.stop(), serving.loop).result(60)
        assert answer.result(60).endswith("data: [DONE]\n\n")
        assert time.monotonic() - start < 20
        with pytest.raises(httpx.ConnectError), asking(serving) as http:
            http.get("/healthz")


def test_where_the_engine_has_failed_all_are_sent_elsewhere(root: Path) -> None:
    """Who streams hears it within the stream; OpenAI's clients may try again, at another server."""
    with running(with_http(root)) as serving, concurrent.futures.ThreadPoolExecutor(1) as threads:
        slow_steps(serving)

        def streamed() -> str:
            with asking(serving) as http:
                return http.post("/v1/completions", json={**LONG, "stream": True}).text

        streaming = threads.submit(streamed)
        wait_for(lambda: stats(serving).running)
        serving.loop.call_soon_threadsafe(serving.server._fail)
        *_, last = streaming.result(60).strip().split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"
        with asking(serving) as http:
            health, late = http.get("/healthz"), http.post("/v1/completions", json=LONG)
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "engine_failed")
        assert "x-should-retry" not in late.headers


async def test_while_the_model_loads_calls_are_told_to_come_again(root: Path) -> None:
    go_on = asyncio.Event()
    server = MoraServer(with_http(root))
    assemble = server._assemble
    loop = asyncio.get_running_loop()

    def later() -> Any:
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        return assemble()

    server._assemble = later  # type: ignore[method-assign]
    starting = asyncio.ensure_future(server.start())
    try:
        while server.http_port < 0:
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}") as http:
            for path, status in (("/healthz", 503), ("/v1/models", 503), ("/metrics", 200)):
                assert (await http.get(path)).status_code == status
            answer = await http.post("/v1/completions", json=LONG)
            assert answer.json()["error"]["code"] == "loading"
            assert answer.headers["retry-after"] == "1"
            go_on.set()
            await starting
            assert (await http.get("/healthz")).json() == {"status": "serving"}
    finally:
        go_on.set()
        await asyncio.gather(starting, return_exceptions=True)
        await server.stop(drain_seconds=0)


def test_a_fault_is_a_request_id_and_no_more(root: Path, monkeypatch: Any) -> None:
    with running(with_http(root)) as serving, asking(serving, **{"x-request-id": "r-1"}) as http:
        parts = serving.server._http.api.parts  # type: ignore[union-attr]
        monkeypatch.setattr(parts.services.answers, "_prompts", None)
        answer = http.post("/v1/completions", json=LONG)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"].endswith("as request r-1")
        assert answer.headers["x-request-id"] == "r-1"
