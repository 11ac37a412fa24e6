"""What calls without a key may hold: health is asked by whoever reaches the port.

Such a request is tiny, but grpc bounds messages by the server, not by the method: what bounds the
memory of those that are not is how many are received at the same time, and for how long. A probe
comes in within a moment; where all places are taken, the one that has taken longest gives way, so
that nobody who sends slowly keeps a probe out. Watches last: a host has at most half of those that
the others leave.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from urllib.parse import unquote

from mora_serve.server.gate import Places
from mora_serve.server.status import Context

WATCHES = 2048  # at the same time
REQUESTS = 16  # being received at the same time
REQUEST_SECONDS = 5.0  # for a request to come in
RETRY_SECONDS = 1.0
NETWORK_BITS = 64  # of an IPv6 address: a machine may have all that follow


class Strangers:
    """Lets calls in that have no key; lives on the event loop."""

    def __init__(self) -> None:
        kind, whose = "health watches", "this host"
        self.watches = Places(WATCHES, kind, whose=whose, retry_seconds=RETRY_SECONDS)
        self._arriving: dict[asyncio.Timeout, None] = {}  # the longest first

    @contextmanager
    def watching(self, context: Context) -> Iterator[None]:
        """The time of a watch. Raises ResourceExhausted where there is no room for it."""
        with self.watches.taken(host_of(str(context.peer()))):
            yield

    @property
    def arriving(self) -> int:
        """Requests that are being received."""
        return len(self._arriving)

    @asynccontextmanager
    async def arrival(self, seconds: float) -> AsyncIterator[None]:
        """The time in which a request comes in.

        Raises TimeoutError after ``seconds``, and sooner where others need the place.
        """
        async with asyncio.timeout(seconds) as timeout:
            if len(self._arriving) >= REQUESTS:
                longest = next(iter(self._arriving))
                del self._arriving[longest]
                with suppress(RuntimeError):  # it ends already
                    longest.reschedule(asyncio.get_running_loop().time())
            self._arriving[timeout] = None
            try:
                yield
            finally:
                self._arriving.pop(timeout, None)


def host_of(peer: str) -> str:
    """Where a call comes from, as grpc names it, without its port; of IPv6 the network."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"{kind}:{host}"
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, NETWORK_BITS), strict=False))
        return str(address.ipv4_mapped)
    return str(address)
