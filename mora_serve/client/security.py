"""What protects a connection: TLS, the client's own certificate, a key that none overhears."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from mora_serve.errors import ConfigError, InvalidArgument
from mora_serve.loopback import leads_to_loopback

ApiKey = str | Callable[[], str]  # what is called, is called for each call: a key may be renewed
Pem = bytes | str | Path  # PEM as it is, or the path of its file

_KEY = re.compile(r"[!-~]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tls:
    """How to secure a connection.

    ``ca`` is the authority of the server's certificate, without it the public ones are. ``cert``
    (a chain) and ``key`` are the client's own, where the server asks for one. ``name`` is whom that
    certificate names, where it is not the address: a server behind a tunnel, or on loopback.
    """

    ca: Pem | None = None
    cert: Pem | None = None
    key: Pem | None = None
    name: str = ""


def secured(
    address: str,
    api_key: ApiKey | None,
    tls: Tls | bool,
    credentials: grpc.ChannelCredentials | None,
    allow_plaintext: bool,
) -> grpc.ChannelCredentials | None:
    """The credentials of a channel to ``address``; None for plaintext.

    Raises ConfigError for a PEM file that cannot be read, for half a client certificate, and for
    a key that others could read on its way.
    """
    if tls and credentials is not None:
        raise ConfigError("tls: credentials are given too; give one of them", field="tls")
    if tls:
        return _credentials(Tls() if tls is True else tls)
    exposed = credentials is None and not leads_to_loopback(address)
    if api_key is not None and exposed and not allow_plaintext:
        raise ConfigError(
            f"api_key: without TLS everyone between here and {address} could read it; give tls, "
            "or allow_plaintext where the network itself is protected",
            field="api_key",
        )
    return credentials


def authorization(api_key: ApiKey) -> tuple[str, str]:
    """The metadata that carries a key. Raises InvalidArgument for what can be none."""
    key = api_key if isinstance(api_key, str) else api_key()
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InvalidArgument(  # which must not quote it
            "api_key: it is empty, or has spaces or other characters than ASCII's; give the key "
            "as it was made",
            field="api_key",
        )
    return "authorization", f"Bearer {key}"


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    if (tls.cert is None) != (tls.key is None):
        missing, given = ("key", "cert") if tls.key is None else ("cert", "key")
        raise ConfigError(
            f"tls.{missing}: it is missing, but tls.{given} is set; give both, or none",
            field=f"tls.{missing}",
        )
    return grpc.ssl_channel_credentials(
        _pem("ca", tls.ca), _pem("key", tls.key), _pem("cert", tls.cert)
    )


def _pem(name: str, given: Pem | None) -> bytes | None:
    if given is None:
        return None
    try:
        data = given if isinstance(given, bytes) else Path(given).read_bytes()
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or "it is no path"
        raise ConfigError(
            f"tls.{name}: the file cannot be read ({reason}); give a PEM file", field=f"tls.{name}"
        ) from None
    if b"-----BEGIN " not in data:
        raise ConfigError(
            f"tls.{name}: it is not in PEM form; give a PEM file", field=f"tls.{name}"
        )
    return data
