"""What calls without a key may hold: health is asked by whoever reaches the port.

Such a request is tiny, but grpc bounds messages by the server, not by the method: what bounds the
memory of those that are not is how many are received at the same time, and for how long. A host has
at most half of what the others leave, so that none keeps another's probes out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mora_serve.server.gate import Places
from mora_serve.server.status import Context

CALLS = 2048  # at the same time; most of them watch
REQUESTS = 16  # being received at the same time
REQUEST_SECONDS = 5.0  # for a request to come in


class Strangers:
    """Lets calls in that have no key; lives on the event loop."""

    def __init__(self) -> None:
        self._calls = Places(CALLS, "health calls")
        self._requests = Places(REQUESTS, "requests of health calls")

    @contextmanager
    def calling(self, context: Context) -> Iterator[None]:
        """The time of a call. Raises ResourceExhausted where there is no room for it."""
        with self._calls.taken(_host(context)):
            yield

    @contextmanager
    def sending(self, context: Context) -> Iterator[None]:
        """The time in which its request comes in. Raises ResourceExhausted likewise."""
        with self._requests.taken(_host(context)):
            yield


def _host(context: Context) -> str:
    """Where a call comes from, without its port."""
    return str(context.peer()).rpartition(":")[0]
