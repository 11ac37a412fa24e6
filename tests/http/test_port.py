"""The HTTP port over real sockets: TLS, slow and many connections, what the port says of itself."""

from __future__ import annotations

import contextlib
import re
import resource
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mora_serve.cli.serve import flags
from mora_serve.errors import ConfigError
from mora_serve.http import server as web
from mora_serve.http.server import listen
from tests.http.conftest import asking, with_http
from tests.server.conftest import Running, running, wait_for
from tests.server.test_tls import Authority

PLAIN = {"model": "base", "prompt": "hi", "max_tokens": 1}


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("http-tls") / "trusted")


def test_tls_is_grpcs_and_renewed_certificates_are_taken_up(
    root: Path, trusted: Authority, monkeypatch: Any
) -> None:
    monkeypatch.setattr("mora_serve.server.tls.CHECK_SECONDS", 0.0)
    cert, key = trusted.issue("server")
    config = with_http(root, server={"tls_cert": str(cert), "tls_key": str(key)})
    context = ssl.create_default_context(cafile=str(trusted.ca))

    def serial(serving: Running) -> int:
        address = ("127.0.0.1", serving.server.http_port)
        with (
            socket.create_connection(address) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            return int(secure.getpeercert()["serialNumber"], 16)

    with running(config) as serving:
        base = f"https://localhost:{serving.server.http_port}"
        with httpx.Client(base_url=base, verify=context) as http:
            assert http.post("/v1/completions", json=PLAIN).status_code == 200
        with pytest.raises(httpx.TransportError), asking(serving) as http:
            http.get("/healthz")
        first = serial(serving)
        trusted.issue("server")
        assert serial(serving) != first
        key.write_bytes(b"half written")
        assert serial(serving) != first  # what is broken is not taken


def test_a_client_needs_a_certificate_where_grpcs_does(root: Path, trusted: Authority) -> None:
    cert, key = trusted.issue("other")
    names = {"tls_cert": str(cert), "tls_key": str(key), "tls_client_ca": str(trusted.ca)}
    with running(with_http(root, server=names)) as serving:
        url = f"https://localhost:{serving.server.http_port}/healthz"
        context = ssl.create_default_context(cafile=str(trusted.ca))
        with pytest.raises(httpx.TransportError):
            httpx.get(url, verify=context)
        context.load_cert_chain(*trusted.issue("client"))
        assert httpx.get(url, verify=context).status_code == 200


def test_a_handshake_has_to_come_in_time(root: Path, trusted: Authority, monkeypatch: Any) -> None:
    monkeypatch.setattr(web, "HEADER_SECONDS", 0.3)
    cert, key = trusted.issue("slow")
    config = with_http(root, server={"tls_cert": str(cert), "tls_key": str(key)})
    with (
        running(config) as serving,
        connect(serving) as silent,
        contextlib.suppress(ConnectionResetError),
    ):
        assert silent.recv(1) == b""


def connect(serving: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", serving.server.http_port), timeout=30)


def test_headers_have_to_come_in_time(root: Path, monkeypatch: Any) -> None:
    """Of a connection that says nothing, of one that says a byte now and then, of a second call."""
    monkeypatch.setattr(web, "HEADER_SECONDS", 2.0)  # and enough for a whole request
    with running(with_http(root)) as serving, contextlib.ExitStack() as stack:
        silent, slow, second = (stack.enter_context(connect(serving)) for _ in range(3))
        slow.sendall(b"GET /healthz HT")
        second.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            part = second.recv(4096)
            assert part
            answer += part
        assert b"200 OK" in answer
        second.sendall(b"GET /heal")
        for connection in (silent, slow, second):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(4096) == b""
        with asking(serving) as http:
            assert http.get("/healthz").status_code == 200


def test_headers_are_bounded(serving: Running) -> None:
    with connect(serving) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /healthz HTTP/1.1\r\nx: " + b"y" * (web.HEADER_BYTES + 10_000))
        answer = connection.recv(4096)
        assert answer == b"" or b"400 Bad Request" in answer
    with asking(serving) as http:
        assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\n"
        b"connection: upgrade\r\n\r\n",
    ],
    ids=range(7),
)
def test_what_is_no_request_of_http_harms_nobody(serving: Running, data: bytes) -> None:
    with connect(serving) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(4096):
                answer += part
    assert not re.search(rb"Traceback|\.py", answer)
    with asking(serving) as http:
        assert http.get("/healthz").status_code == 200


def test_what_becomes_no_http_after_an_answer_is_hung_up_on(serving: Running, caplog: Any) -> None:
    """Without a word in the log, which whoever reaches the port could fill so."""
    refused = b"POST /v1/none HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with connect(serving) as connection:
        connection.sendall(refused)
        assert b"404 Not Found" in connection.recv(4096)
        connection.sendall(b"no chunk\r\n")
        with contextlib.suppress(ConnectionError):
            while connection.recv(4096):
                pass
    with asking(serving) as http:
        assert http.get("/healthz").status_code == 200
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def test_a_host_has_a_part_of_the_connections(root: Path, monkeypatch: Any) -> None:
    """One that takes all it can get leaves as many for others, and comes again when it hangs up."""
    monkeypatch.setattr(web, "CONNECTIONS", 8)
    with running(with_http(root)) as serving, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(serving)) for _ in range(4)]
        places = serving.server._http._server.places  # type: ignore[union-attr]
        wait_for(lambda: places.held == 4)
        with connect(serving) as refused, contextlib.suppress(ConnectionResetError):
            assert refused.recv(1) == b""
        held.pop().close()
        wait_for(lambda: places.held == 3)
        with asking(serving) as http:
            assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("files", "most"), [(1024, 512), (1 << 20, 4096), (resource.RLIM_INFINITY, 4096)]
)
def test_connections_leave_half_of_the_processs_files(
    files: int, most: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, files))
    assert web.most_connections() == most


def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError) as caught:
            listen("127.0.0.1", taken.getsockname()[1], "server.http_")
    assert caught.value.field == "server.http_port"


async def test_without_the_extra_the_remedy_is_told(root: Path, monkeypatch: Any) -> None:
    import sys

    from mora_serve.server.app import MoraServer

    for name in [n for n in sys.modules if n.startswith("mora_serve.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError) as caught:
        MoraServer(with_http(root))._listen()
    assert "pip install 'mora-serve[http]'" in caught.value.message


def test_the_address_is_one_flag() -> None:
    from mora_serve.cli import build_parser

    args = build_parser().parse_args(["serve", "--http-address", "[::1]:8080"])
    assert flags(args) == {"server.http_host": "::1", "server.http_port": "8080"}
    args = build_parser().parse_args(["serve", "--http-address", ":0"])
    assert flags(args) == {"server.http_port": "0"}
    with pytest.raises(ConfigError):
        flags(build_parser().parse_args(["serve", "--http-address", "8080"]))


def test_metrics_are_those_of_the_prometheus_port(serving: Running) -> None:
    """The same registry; calls of this port are counted by their paths."""
    with asking(serving) as http:
        http.get("/v1/models/rev")
        http.get("/nothing/at/all")
        here = http.get("/metrics")
        there = httpx.get(f"http://127.0.0.1:{serving.server.metrics_port}/metrics")
    names = [
        {family.name for family in text_string_to_metric_families(answer.text)}
        for answer in (here, there)
    ]
    assert names[0] == names[1] >= {"mora_grpc_requests", "mora_num_requests_running"}
    assert 'method="/v1/models/{model:path}"' in here.text
    assert 'method="unknown"' in here.text
    assert "/nothing" not in here.text


def test_errors_of_this_port_are_counted_by_their_reason(serving: Running) -> None:
    def counted() -> float:
        value = serving.server.metrics.registry.get_sample_value(
            "mora_refusals_total", {"reason": "NOT_JSON"}
        )
        return value or 0.0

    before = counted()
    with asking(serving) as http:
        http.post("/v1/completions", content="hi", headers={"content-type": "text/plain"})
    assert counted() == before + 1


def test_the_page_of_the_api_asks_nobody_else(serving: Running) -> None:
    with asking(serving) as http:
        page, spec = http.get("/docs").text, http.get("/openapi.json").json()
    assert not re.search(r"""(?:src|href)\s*=\s*['"]?(?:https?:)?//|<script|@import""", page)
    for path in spec["paths"]:
        assert path in page
    body = spec["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"model", "messages", "mora", "stream", "top_k"} <= body.keys()
    assert "tools" not in body
    assert all(f"<code>{name}</code>" in page for name in body)


def test_calls_are_logged_as_those_of_grpc(serving: Running, caplog: Any) -> None:
    with caplog.at_level("INFO", "mora_serve.calls"), asking(serving) as http:
        http.post("/v1/completions", json=PLAIN, headers={"x-request-id": "logged-1"})
        http.get("/healthz")
        wait_for(lambda: caplog.records)
    [record] = caplog.records
    assert record.request_id == "logged-1"
    assert record.fields["method"] == "/v1/completions"
    assert record.fields["code"] == "OK"
    assert record.fields["completion_tokens"] == 1


def test_a_request_id_is_the_callers_or_a_new_one(serving: Running) -> None:
    with asking(serving) as http:
        assert (
            http.get("/healthz", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
        )
        ids = {http.get("/healthz").headers["x-request-id"] for _ in range(2)}
        assert len(ids) == 2
        answer = http.get("/v1/models", headers={"x-request-id": "no spaces"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-id")
