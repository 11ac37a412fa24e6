"""Ports over real sockets: who gets in, what is refused at the start, and renewed certificates."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc import aio

from mora_serve import errors
from mora_serve.cli import main
from mora_serve.client import AsyncClient, Client, Tls
from mora_serve.config import ServerConfig
from mora_serve.server import tls
from tests.server.conftest import Running, configuration, running


class Authority:
    """A certificate authority with its files: ``ca``, and pairs of certificate and key by name."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._ca = trustme.CA()
        self.ca = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, name: str) -> tuple[Path, Path]:
        """A new certificate for this machine and its key, in the files of a name."""
        made = self._ca.issue_cert("localhost", "127.0.0.1", common_name=name)
        cert, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        cert.write_bytes(b"".join(p.bytes() for p in made.cert_chain_pems))
        made.private_key_pem.write_to_path(key)
        return cert, key

    def client(self, *, own: bool = True) -> Tls:
        """What a client needs, with or without a certificate of its own."""
        return Tls(self.ca, *self.issue("client")) if own else Tls(self.ca)


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority of the servers and clients."""
    return Authority(tmp_path_factory.mktemp("tls") / "trusted")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("tls") / "stranger")


def settings(authority: Authority, name: str = "server", **changes: Any) -> ServerConfig:
    """A configuration with new files."""
    cert, key = authority.issue(name)
    return ServerConfig(**({"tls_cert": str(cert), "tls_key": str(key)} | changes))


@contextlib.asynccontextmanager
async def listening(config: ServerConfig, **options: Any) -> AsyncIterator[int]:
    """The port of a server with one method, /t.S/Echo."""

    async def echo(request: bytes, context: object) -> bytes:
        return request

    server = aio.server()
    method = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("t.S", {"Echo": method}),)
    )
    port = tls.add_port(server, "127.0.0.1", 0, config, tls.credentials(config, **options))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


async def echo(port: int, secure: Tls | None) -> bytes:
    """Call the method over a connection of its own."""
    async with AsyncClient(f"127.0.0.1:{port}", tls=secure or False) as client:
        answer: bytes = await client.channel.unary_unary("/t.S/Echo")(b"hello", timeout=20)
        return answer


async def refused(port: int, secure: Tls | None) -> str:
    """What grpc says where no connection comes about."""
    with pytest.raises(aio.AioRpcError) as caught:
        await echo(port, secure)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return caught.value.details()


async def served(port: int) -> str:
    """The certificate that a new connection gets, as PEM."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(True)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ssl.DER_cert_to_PEM_cert(der)


def pem(path: str) -> str:
    """A certificate's file, as ``served`` tells it."""
    return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(Path(path).read_text()))


class TestWhoGetsIn:
    async def test_a_client_that_knows_the_authority(self, trusted):
        async with listening(settings(trusted)) as port:
            assert await echo(port, trusted.client(own=False)) == b"hello"

    async def test_a_client_of_another_authority_does_not_trust_the_server(self, trusted, stranger):
        async with listening(settings(trusted)) as port:
            assert "handshake" in (await refused(port, stranger.client(own=False))).lower()

    async def test_plaintext_is_not_answered(self, trusted):
        async with listening(settings(trusted)) as port:
            await refused(port, None)

    async def test_with_a_client_authority_only_its_clients(self, trusted, stranger):
        """Neither one without a certificate nor one whose certificate another authority signed."""
        config = settings(trusted, tls_client_ca=str(trusted.ca))
        async with listening(config) as port:
            assert await echo(port, trusted.client()) == b"hello"
            await refused(port, trusted.client(own=False))
            other = stranger.client()
            await refused(port, Tls(trusted.ca, other.cert, other.key))
            assert await echo(port, trusted.client()) == b"hello"


class TestRenewal:
    @pytest.fixture
    def now(self):
        """The time that the server goes by, in a list."""
        return [0.0]

    async def test_new_connections_get_a_renewed_certificate(self, trusted, now):
        """Without a restart, and without a look at the files at every connection."""
        config = settings(trusted, "renewed")
        old = pem(config.tls_cert)
        async with listening(config, clock=lambda: now[0]) as port:
            assert await served(port) == old
            trusted.issue("renewed")
            new = pem(config.tls_cert)
            assert new != old
            now[0] += tls.CHECK_SECONDS / 2
            assert await served(port) == old
            now[0] += tls.CHECK_SECONDS
            assert await served(port) == new
            assert await echo(port, trusted.client(own=False)) == b"hello"

    async def test_half_a_renewal_waits_for_the_other_half(self, trusted, now, caplog):
        """What does not fit together is not used, and said once."""
        config = settings(trusted, "halved")
        old, key = pem(config.tls_cert), Path(config.tls_key).read_bytes()
        async with listening(config, clock=lambda: now[0]) as port:
            trusted.issue("halved")
            new_key = Path(config.tls_key).read_bytes()
            Path(config.tls_key).write_bytes(key)
            with caplog.at_level(logging.INFO, tls.__name__):
                for _ in range(3):
                    now[0] += 2 * tls.CHECK_SECONDS
                    assert await served(port) == old
                (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
                assert "server.tls_key" in warning.getMessage()
                Path(config.tls_key).write_bytes(new_key)
                now[0] += 2 * tls.CHECK_SECONDS
                assert await served(port) == pem(config.tls_cert) != old

    async def test_files_that_vanish_change_nothing(self, trusted, now):
        config = settings(trusted, "gone")
        old = pem(config.tls_cert)
        async with listening(config, clock=lambda: now[0]) as port:
            Path(config.tls_cert).unlink()
            now[0] += 2 * tls.CHECK_SECONDS
            assert await served(port) == old

    async def test_clients_of_a_new_authority_get_in(self, trusted, stranger, now, tmp_path):
        ca = tmp_path / "clients.pem"
        ca.write_bytes(trusted.ca.read_bytes())
        config = settings(trusted, tls_client_ca=str(ca))
        other = stranger.client()
        secure = Tls(trusted.ca, other.cert, other.key)
        async with listening(config, clock=lambda: now[0]) as port:
            await refused(port, secure)
            ca.write_bytes(stranger.ca.read_bytes())
            now[0] += 2 * tls.CHECK_SECONDS
            assert await echo(port, secure) == b"hello"
            await refused(port, trusted.client())


class TestConfiguration:
    def test_without_files_there_is_no_tls(self):
        assert tls.credentials(ServerConfig()) is None

    @pytest.mark.parametrize(
        ("given", "field", "remedy"),
        [
            ({"tls_key": ""}, "tls_key", "give the PEM files"),
            ({"tls_cert": ""}, "tls_cert", "give the PEM files"),
            ({"tls_cert": "", "tls_key": "", "tls_client_ca": "ca"}, "tls_cert", "tls_client_ca"),
            ({"tls_cert": "none"}, "tls_cert", "cannot be read"),
            ({"tls_key": "none"}, "tls_key", "cannot be read"),
            ({"tls_client_ca": "none"}, "tls_client_ca", "cannot be read"),
            ({"tls_cert": "junk"}, "tls_cert", "holds no certificate"),
            ({"tls_key": "junk"}, "tls_key", "holds no private key"),
            ({"tls_client_ca": "junk"}, "tls_client_ca", "holds no certificate"),
            ({"tls_client_ca": "binary"}, "tls_client_ca", "holds no certificate"),
            ({"tls_key": "other.key"}, "tls_key", "give the pair"),
            ({"tls_key": "encrypted"}, "tls_key", "without a passphrase"),
            ({"tls_cert": "directory"}, "tls_cert", "cannot be read"),
        ],
    )
    def test_files_that_do_not_do_are_named_with_a_remedy(
        self, trusted, tmp_path, given, field, remedy
    ):
        """By their key, not by their path."""
        (tmp_path / "junk").write_text("junk")
        (tmp_path / "binary").write_bytes(b"\xff\x00")
        (tmp_path / "encrypted").write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
        (tmp_path / "directory").mkdir()
        (tmp_path / "ca").write_bytes(trusted.ca.read_bytes())
        (tmp_path / "other.key").write_bytes(trusted.issue("other")[1].read_bytes())
        changes = {k: v and str(tmp_path / v) for k, v in given.items()}
        with pytest.raises(errors.ConfigError, match=remedy) as caught:
            tls.credentials(settings(trusted, **changes))
        assert caught.value.field == f"server.{field}"
        assert f"server.{field}: " in caught.value.message
        assert str(tmp_path) not in caught.value.message

    @pytest.mark.parametrize("host", ["0.0.0.0", "::"])
    async def test_plaintext_beyond_loopback_has_to_be_asked_for(self, trusted, host):
        server = aio.server()
        for prefix in ("server.", "server.admin_"):
            with pytest.raises(errors.ConfigError) as caught:
                tls.add_port(server, host, 0, ServerConfig(), None, prefix)
            assert caught.value.field == f"{prefix}host"
            assert "server.tls_cert" in caught.value.message
            assert "server.allow_plaintext" in caught.value.message

    async def test_beyond_loopback_with_tls_or_where_it_was_asked_for(self, trusted):
        server, config = aio.server(), settings(trusted)
        assert tls.add_port(server, "0.0.0.0", 0, config, tls.credentials(config))
        assert tls.add_port(server, "0.0.0.0", 0, ServerConfig(allow_plaintext=True), None)

    async def test_a_port_in_use_is_explained(self, trusted):
        config = settings(trusted)
        async with listening(config) as port:
            server = aio.server(options=(("grpc.so_reuseport", 0),))
            for secure in (None, tls.credentials(config)):
                with pytest.raises(errors.ConfigError, match="choose another port") as caught:
                    tls.add_port(server, "127.0.0.1", port, config, secure)
                assert caught.value.field == "server.port"


@pytest.fixture(scope="module")
def secure(root: Path, trusted: Authority) -> Iterator[Running]:
    """The whole server with mutual TLS."""
    cert, key = trusted.issue("whole")
    files = {"tls_cert": str(cert), "tls_key": str(key), "tls_client_ca": str(trusted.ca)}
    with running(configuration(root, server=files)) as serving:
        yield serving


class TestServer:
    """Clients as users make them."""

    def test_the_blocking_client(self, secure, trusted):
        with Client(secure.server.address, tls=trusted.client(), api_key="k") as client:
            client.wait_until_ready(20)
            assert client.generate("hello", base=True, max_tokens=2).usage.completion_tokens == 2
            assert len(list(client.stream("hello", base=True, max_tokens=2)))

    async def test_the_asyncio_client(self, secure, trusted):
        async with AsyncClient(secure.server.address, tls=trusted.client()) as client:
            assert (await client.generate("hello", base=True, max_tokens=1)).tokens

    def test_one_without_a_certificate_learns_what_to_look_at(self, secure, stranger):
        with Client(secure.server.address, tls=stranger.client(own=False)) as client:
            with pytest.raises(errors.Unavailable, match=r"no secure connection; .* CA") as caught:
                client.server_info(timeout=10)
            assert secure.server.address in caught.value.message

    def test_the_command_line(self, secure, trusted, capsys):
        own = trusted.client()
        flags = ("--tls-ca", own.ca, "--tls-cert", own.cert, "--tls-key", own.key)
        command = ("info", "--json", "--address", secure.server.address)
        assert main([*command, *map(str, flags)]) == 0
        assert '"fingerprint"' in capsys.readouterr().out
        assert main([*command, "--timeout", "5", *map(str, flags[:2])]) == 1

    @pytest.mark.parametrize(
        ("flags", "field"),
        [
            ({"host": "0.0.0.0"}, r"server\.host"),
            ({"tls_cert": "nowhere", "tls_key": "nowhere"}, r"server\.tls_cert"),
            ({"metrics_host": "nonsense.invalid"}, r"server\.metrics_host"),
        ],
    )
    def test_what_cannot_be_listened_on_ends_it_before_anything_is_loaded(
        self, configure, flags, field
    ):
        config = configure(server=flags, base={"model": "/nowhere"})
        with pytest.raises(errors.ConfigError, match=field), running(config):
            pass

    def test_administrators_have_an_address_with_tls_of_their_own(self, configure, trusted):
        """Both ports take what the one took alone."""
        cert, key = trusted.issue("both")
        files = {"tls_cert": str(cert), "tls_key": str(key)}
        with running(configure(server=files | {"admin_port": 0})) as serving:
            server, secure = serving.server, trusted.client(own=False)
            with Client(server.address, tls=secure) as client:
                assert client.generate("hello", base=True, max_tokens=1).tokens
                client.register_adapter("rev", "rev")
                with pytest.raises(errors.PermissionDenied):
                    client.pin_adapter("rev")
            with Client(f"127.0.0.1:{server.admin_port}", tls=secure) as client:
                assert client.pin_adapter("rev").pinned

    def test_metrics_stay_on_loopback(self, configure):
        """Wherever the calls come in: they have neither TLS nor keys."""
        config = configure(server={"host": "127.0.0.2"})
        with running(config) as serving:
            assert serving.server._exposition.server_address[0] == "127.0.0.1"
