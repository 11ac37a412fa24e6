"""TLS of the HTTP port, from the same certificate files as gRPC's, which may change."""

from __future__ import annotations

import contextlib
import ssl

from mora_serve.config import ServerConfig
from mora_serve.server import tls


def context(config: ServerConfig) -> ssl.SSLContext | None:
    """What a server needs for TLS, or None where ``config`` asks for none.

    Each connection gets the newest certificate that is whole. Raises ConfigError as
    ``tls.certificates`` does.
    """
    certificates = tls.certificates(config)
    if certificates is None:
        return None
    newest = _made(config)

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        nonlocal newest
        if certificates.newer() is not None:
            # Written to once more meanwhile: whole again when they are looked at next.
            with contextlib.suppress(ssl.SSLError, OSError):
                newest = _made(config)
        connection.context = newest

    first = _made(config)
    first.sni_callback = choose
    return first


def _made(config: ServerConfig) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.load_cert_chain(config.tls_cert, config.tls_key)
    if config.tls_client_ca:
        made.load_verify_locations(config.tls_client_ca)
        made.verify_mode = ssl.CERT_REQUIRED
    return made
