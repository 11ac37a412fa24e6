"""Which addresses never leave this machine: the server listens and clients speak there in plain.

No name is looked up, as an answer may be another one when grpc asks again: of names, only
``localhost`` is loopback, and an address that cannot be read is not.
"""

from __future__ import annotations

import ipaddress

_SOCKETS = ("unix:", "unix-abstract:")
_SCHEMES = ("dns:///", "dns:", "ipv4:", "ipv6:")


def is_loopback(host: str) -> bool:
    """Whether a host (a name, an IPv4 or IPv6 address, a unix socket) is of this machine only."""
    if host.startswith(_SOCKETS):
        return True
    host = host.removeprefix("[").removesuffix("]")
    if host.lower().removesuffix(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def leads_to_loopback(target: str) -> bool:
    """Whether all that a grpc client's target (``HOST:PORT``, ``unix:PATH``...) names is loopback.

    A target of a scheme that asks others for addresses is not.
    """
    if target.startswith(_SOCKETS):
        return True
    scheme = next((s for s in _SCHEMES if target.lower().startswith(s)), "")
    addresses = target[len(scheme) :].split(",") if scheme in ("ipv4:", "ipv6:") else [target]
    return all(is_loopback(_host(a.removeprefix(scheme))) for a in addresses)


def _host(address: str) -> str:
    """The host of ``HOST``, ``HOST:PORT``, ``[IPV6]:PORT`` or a bare IPv6 address."""
    if address.startswith("["):
        host, _, rest = address[1:].partition("]")
        return host if not rest or rest.startswith(":") else ""
    host, colon, port = address.partition(":")
    return address if colon and ":" in port else host
