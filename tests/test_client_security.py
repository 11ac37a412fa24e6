"""What protects a client's connection: its key, where it may go, and the files of TLS."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from mora_serve import errors
from mora_serve.cli import main
from mora_serve.client import AsyncClient, Client, Tls
from mora_serve.v1 import server_pb2

REMOTE = "models.example.com:50051"
PEM = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


class Recorder(grpc.GenericRpcHandler):
    """Answers GetServerInfo and keeps what came with each call; may refuse the first ones."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.refusals = 0

    def service(self, handler_call_details: Any) -> Any:
        self.seen.append(dict(handler_call_details.invocation_metadata))

        def answer(request: bytes, context: Any) -> bytes:
            if self.refusals:
                self.refusals -= 1
                context.set_trailing_metadata((("grpc-retry-pushback-ms", "10"),))
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
            return server_pb2.GetServerInfoResponse().SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((recorder,))
    recorder.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield recorder
    server.stop(0).wait()


class TestKeys:
    def test_a_key_goes_with_every_call(self, recorder):
        with Client(recorder.address, api_key="mora-abc") as client:
            client.server_info()
        assert recorder.seen[0]["authorization"] == "Bearer mora-abc"

    async def test_so_does_it_from_the_asyncio_client(self, recorder):
        async with AsyncClient(recorder.address, api_key="mora-abc") as client:
            await client.server_info()
        assert recorder.seen[0]["authorization"] == "Bearer mora-abc"

    def test_without_a_key_nothing_is_sent(self, recorder):
        with Client(recorder.address) as client:
            client.server_info()
        assert "authorization" not in recorder.seen[0]

    def test_a_key_that_is_renewed_is_asked_for_each_time(self, recorder):
        keys = iter(("one", "two"))
        with Client(recorder.address, api_key=lambda: next(keys)) as client:
            client.server_info()
            client.server_info()
        assert [seen["authorization"] for seen in recorder.seen] == ["Bearer one", "Bearer two"]

    def test_a_call_that_is_pushed_back_is_repeated_with_its_key(self, recorder):
        recorder.refusals = 2
        with Client(recorder.address, api_key="k") as client:
            client.server_info()
        assert [seen.get("authorization") for seen in recorder.seen] == ["Bearer k"] * 3

    @pytest.mark.parametrize("key", ["", "two words", "tab\t", "line\n", "schlüssel", b"bytes", 7])
    def test_what_can_be_no_key_is_refused_and_not_quoted(self, recorder, key):
        for given in (key, lambda: key):
            if given == b"bytes" or given == 7:
                continue
            with Client(recorder.address, api_key=given) as client:
                with pytest.raises(errors.InvalidArgument, match="as it was made") as caught:
                    client.server_info()
                assert caught.value.field == "api_key"
                assert not str(key) or str(key) not in caught.value.message
        assert not recorder.seen


@pytest.mark.parametrize("cls", [Client, AsyncClient])
class TestPlaintext:
    async def test_a_key_does_not_leave_the_machine_in_plain(self, cls):
        with pytest.raises(errors.ConfigError, match="without TLS") as caught:
            cls(REMOTE, api_key="mora-secret")
        assert caught.value.field == "api_key"
        for remedy in ("tls", "allow_plaintext"):
            assert remedy in caught.value.message
        assert "mora-secret" not in caught.value.message

    @pytest.mark.parametrize(
        ("address", "options"),
        [
            (REMOTE, {"api_key": "k", "tls": True}),
            (REMOTE, {"api_key": "k", "credentials": grpc.ssl_channel_credentials()}),
            (REMOTE, {"api_key": "k", "allow_plaintext": True}),
            (REMOTE, {}),
            ("localhost:50051", {"api_key": "k"}),
            ("[::1]:50051", {"api_key": "k"}),
        ],
    )
    async def test_it_may_go_where_it_is_safe_or_was_asked_for(self, cls, address, options):
        cls(address, **options)


@pytest.mark.parametrize("cls", [Client, AsyncClient])
class TestTls:
    @pytest.mark.parametrize(
        ("given", "field", "remedy"),
        [
            ({"ca": "none.pem"}, "tls.ca", "cannot be read"),
            ({"ca": "a\0b"}, "tls.ca", "no path"),
            ({"ca": b"junk"}, "tls.ca", "give a PEM file"),
            ({"cert": PEM}, "tls.key", "give both, or none"),
            ({"key": PEM}, "tls.cert", "give both, or none"),
        ],
    )
    async def test_files_that_do_not_do_are_named(self, cls, given, field, remedy):
        with pytest.raises(errors.ConfigError, match=remedy) as caught:
            cls(REMOTE, tls=Tls(**given))
        assert caught.value.field == field

    async def test_two_ways_of_securing_it_are_one_too_many(self, cls):
        with pytest.raises(errors.ConfigError, match="give one of them"):
            cls(REMOTE, tls=True, credentials=grpc.ssl_channel_credentials())

    async def test_pem_may_come_as_bytes_or_as_a_path(self, cls, tmp_path):
        (tmp_path / "ca.pem").write_bytes(PEM)
        for ca in (PEM, tmp_path / "ca.pem", str(tmp_path / "ca.pem")):
            cls(REMOTE, tls=Tls(ca=ca))


def test_what_stays_on_this_machine_takes_no_proxy(recorder, monkeypatch):
    """A proxy of the surroundings would read the key."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with Client(recorder.address, api_key="k", timeout=20) as client:
        client.server_info()


class TestCommandLine:
    @pytest.fixture
    def key_file(self, tmp_path: Path) -> Path:
        (tmp_path / "key").write_text("from-file\n")
        return tmp_path / "key"

    @pytest.fixture
    def info(self, recorder, monkeypatch):
        """Runs ``mora-serve info`` with flags and environment; the key that was sent."""

        def info(*flags: object, **environ: str) -> str | None:
            monkeypatch.delenv("MORA_API_KEY", raising=False)
            for name, value in environ.items():
                monkeypatch.setenv(name, value)
            assert main(["info", "--json", "--address", recorder.address, *map(str, flags)]) == 0
            key: str | None = recorder.seen[-1].get("authorization")
            return key

        return info

    def test_the_key_comes_from_a_file_or_from_the_environment(self, info, key_file):
        assert info() is None
        assert info(MORA_API_KEY="from-environment") == "Bearer from-environment"
        assert info(MORA_API_KEY="") is None
        assert info("--api-key-file", key_file) == "Bearer from-file"
        assert info("--api-key-file", key_file, MORA_API_KEY="x") == "Bearer from-file"

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--api-key-file", "none"), "--api-key-file: it cannot be read"),
            (("--api-key-file", "empty"), "--api-key-file: it is empty"),
            (("--api-key-file", "binary"), "--api-key-file: it cannot be read"),
            (("--tls", "--plaintext"), "--plaintext: it is for connections without TLS"),
            (("--tls-ca", "none"), "tls.ca: the file cannot be read"),
            (("--tls-cert", "key"), "tls.key: it is missing"),
            (("--tls-ca", "key"), "tls.ca: it is not in PEM"),
            (("--address", REMOTE, "--api-key-file", "key"), "api_key: without TLS"),
        ],
    )
    def test_a_wrong_way_of_protecting_it_exits_with_two(
        self, key_file, monkeypatch, capsys, flags, message
    ):
        monkeypatch.chdir(key_file.parent)
        Path("empty").write_text("\n")
        Path("binary").write_bytes(b"\xff\xfe")
        assert main(["info", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert "from-file" not in error

    @pytest.mark.parametrize(
        "command",
        [
            *(["info"], ["route", "x"], ["generate", "x"], ["feedback", "export", "-"]),
            *(["adapters", "list"], ["adapters", "show", "a"], ["adapters", "pin", "a"]),
            *(["adapters", "register", "a", "b"], ["adapters", "unregister", "a"]),
            ["adapters", "update", "a", "--task", "t"],
        ],
        ids=" ".join,
    )
    def test_every_command_sends_no_key_in_plain(self, command, monkeypatch, capsys):
        monkeypatch.setenv("MORA_API_KEY", "k")
        assert main([*command, "--address", REMOTE]) == 2
        assert "without TLS" in capsys.readouterr().err

    def test_there_is_no_flag_for_the_key_itself(self, capsys):
        with pytest.raises(SystemExit):
            main(["info", "--api-key", "mora-secret"])
        assert "did you mean --api-key-file" in capsys.readouterr().err
