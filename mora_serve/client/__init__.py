"""Clients: ``Client`` blocks, ``AsyncClient`` is for asyncio; the methods are the same.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Reverse the word: stone").text)

Failures are raised as the classes of ``mora_serve.errors``. Calls that can be repeated without
harm are, when the server is unavailable or asks to be called again later. What describes
adapters, routers and servers are the API's own messages (``mora_serve.v1``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mora_serve.client.asynchronous import AsyncClient, AsyncStream
    from mora_serve.client.blocking import Client, Stream
    from mora_serve.client.connection import DEFAULT_ADDRESS, Delta, Result
    from mora_serve.client.security import Tls

__all__ = [
    "DEFAULT_ADDRESS",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Delta",
    "Result",
    "Stream",
    "Tls",
]

_HOMES = {
    "AsyncClient": "asynchronous",
    "AsyncStream": "asynchronous",
    "Client": "blocking",
    "Stream": "blocking",
    "DEFAULT_ADDRESS": "connection",
    "Delta": "connection",
    "Result": "connection",
    "Tls": "security",
}


def __getattr__(name: str) -> Any:  # grpc is imported when a client is wanted, not before
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
