"""Ports: TLS from certificate files that may change, or plaintext where nobody can listen in."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable

import grpc
from grpc import aio

from mora_serve.config import ServerConfig
from mora_serve.errors import ConfigError
from mora_serve.loopback import is_loopback

log = logging.getLogger(__name__)

CHECK_SECONDS = 2.0  # between two looks at the files

_Files = dict[str, bytes]  # by the key's name: tls_cert, tls_key and, if set, tls_client_ca


def credentials(
    config: ServerConfig, clock: Callable[[], float] = time.monotonic
) -> grpc.ServerCredentials | None:
    """What ``add_port`` needs for TLS, or None where ``config`` asks for none.

    Files that change are read again, so that a renewed certificate needs no restart: each new
    connection gets the newest that is whole. ``clock`` counts the seconds in between.

    Raises ConfigError for a file that is missing, cannot be read or does not fit the others.
    """
    found = certificates(config, clock)
    if found is None:
        return None
    return grpc.dynamic_ssl_server_credentials(
        found.current,
        found.newer,  # type: ignore[arg-type]  # the stub knows no None, "no change"
        bool(config.tls_client_ca),
    )


def certificates(
    config: ServerConfig, clock: Callable[[], float] = time.monotonic
) -> Certificates | None:
    """The certificates that ``config`` names, or None where it names none.

    Raises ConfigError as ``credentials`` does.
    """
    if not (config.tls_cert or config.tls_key or config.tls_client_ca):
        return None
    for name, other in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        if not getattr(config, name):
            given = other if getattr(config, other) else "tls_client_ca"
            raise ConfigError(
                f"server.{name}: it is missing, but server.{given} is set; give the PEM files of "
                "the server's certificate chain and of its key",
                field=f"server.{name}",
            )
    return Certificates(config, clock)


class Certificates:
    """The certificate files of a server, as they were when they last fitted together."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        names = ("tls_cert", "tls_key", "tls_client_ca")
        self._paths = {name: path for name in names if (path := getattr(config, name))}
        self._clock = clock
        self._lock = threading.Lock()
        self._looked = clock()
        self._seen = self._signature()
        self._complaint = ""
        self.current = _configuration(_read(self._paths))

    def newer(self) -> grpc.ServerCertificateConfiguration | None:
        """The files' new content, where they have changed and fit; never raises.

        grpc asks at each connection, on threads of its own.
        """
        with self._lock:
            now = self._clock()
            if now - self._looked < CHECK_SECONDS:
                return None
            self._looked = now
            signature = self._signature()
            if signature == self._seen:
                return None
            try:
                self.current = _configuration(_read(self._paths))
            except ConfigError as e:  # half of them are written, perhaps: look again later
                if e.message != self._complaint:
                    log.warning("the certificate in use stays: %s", e.message)
                self._complaint = e.message
                return None
            self._seen, self._complaint = signature, ""
            log.info("the certificate files have changed: new connections get the new ones")
            return self.current

    def _signature(self) -> list[tuple[int, ...]]:
        """What differs when a file has been written, or exchanged."""
        found: list[tuple[int, ...]] = []
        for path in self._paths.values():
            try:
                status = os.stat(path)
            except OSError:
                found.append(())
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return found


def add_port(
    server: aio.Server,
    host: str,
    port: int,
    config: ServerConfig,
    secure: grpc.ServerCredentials | None,
    prefix: str = "server.",
) -> int:
    """Listen with the credentials that ``credentials`` made; the real port.

    Errors name the keys ``prefix`` + ``host`` and ``port``. Raises ConfigError for an address
    that cannot be listened on, and for plaintext beyond loopback that was not asked for.
    """
    check_address(host, port, config, prefix, secure=secure is not None)
    address = join(host, port)
    try:
        if secure is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, secure)
    except RuntimeError:
        raise cannot_listen(host, port, prefix) from None


def check_address(host: str, port: int, config: ServerConfig, prefix: str, *, secure: bool) -> None:
    """Raise ConfigError for an address of no machine, and for plaintext that was not asked for."""
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError):
        raise ConfigError(
            f"{prefix}host: {host!r} is no address of this machine; give one, such as "
            "127.0.0.1 or 0.0.0.0",
            field=f"{prefix}host",
        ) from None
    if not secure and not config.allow_plaintext and not is_loopback(host):
        raise ConfigError(
            f"{prefix}host: {host!r} can be reached from other machines, and without TLS everyone "
            "in between reads along; set server.tls_cert and server.tls_key, or "
            "server.allow_plaintext = true where the network itself is protected",
            field=f"{prefix}host",
        )


def cannot_listen(host: str, port: int, prefix: str) -> ConfigError:
    """The error for a port that is taken, or is none of this machine's."""
    return ConfigError(
        f"{prefix}port: {join(host, port)} cannot be listened on; choose another port, stop what "
        f"uses this one, or set {prefix}host to an address of this machine",
        field=f"{prefix}port",
    )


def join(host: str, port: int) -> str:
    """Host and port as one address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _read(paths: dict[str, str]) -> _Files:
    """The files' content, checked to fit together. Raises ConfigError."""
    files = {name: _content(name, path) for name, path in paths.items()}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if b"ENCRYPTED" in files["tls_key"]:
        raise _unfit("tls_key", "the key is encrypted; give one without a passphrase")
    try:
        context.load_cert_chain(paths["tls_cert"], paths["tls_key"], password="")
    except (ssl.SSLError, OSError) as e:
        raise _mismatch(e, paths["tls_cert"]) from None
    if files != {name: _content(name, path) for name, path in paths.items()}:
        raise _unfit("tls_cert", "the file changed while it was read; try again")
    if "tls_client_ca" in files:
        try:
            context.load_verify_locations(cadata=files["tls_client_ca"].decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError):
            raise _unfit(
                "tls_client_ca", "it holds no certificate; give the PEM file of the clients' CA"
            ) from None
    return files


def _mismatch(error: OSError, cert: str) -> ConfigError:
    """Which of the two files it is that does not do."""
    if getattr(error, "reason", "") == "KEY_VALUES_MISMATCH":
        return _unfit("tls_key", "it is not the key of server.tls_cert; give the pair")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cert)
    except (ssl.SSLError, OSError):
        return _unfit("tls_cert", "it holds no certificate; give a PEM file, the server's first")
    return _unfit("tls_key", "it holds no private key; give the PEM file of the certificate's key")


def _content(name: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as e:
        raise _unfit(
            name,
            f"the file cannot be read ({e.strerror}); give a PEM file that the server may read",
        ) from None


def _unfit(name: str, message: str) -> ConfigError:
    return ConfigError(f"server.{name}: {message}", field=f"server.{name}")


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    pair = (files["tls_key"], files["tls_cert"])
    return grpc.ssl_server_certificate_configuration([pair], files.get("tls_client_ca"))
