"""Health, as grpc.health.v1 says it: one status for the server and each of its services.

grpc's own servicer writes to whoever watches while it holds what a change of the status waits for,
so that one client that does not read keeps the status as it is. Here a change waits for nobody.
"""

# ruff: noqa: N802 - methods carry the names of their calls

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from mora_serve.errors import NotFound

SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # no stubs
    """NOT_SERVING until it is told otherwise; lives on the event loop.

    ``services`` are those that can be asked for, besides "" for the whole. Requests are read and
    dropped: nothing of a caller's is kept while it watches.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", *services))
        self._status = pb.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._over = False

    def set(self, *, serving: bool) -> None:
        """Say so from now on, to those who watch as well."""
        if self._over:
            return
        response = pb.HealthCheckResponse
        self._status = response.SERVING if serving else response.NOT_SERVING
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def end(self) -> None:
        """NOT_SERVING for good."""
        self.set(serving=False)
        self._over = True

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        """The status now."""
        if request.service not in self._services:
            raise NotFound(
                "service: the server has none of this name; see its reflection, or leave it empty",
                field="service",
                reason="SERVICE_NOT_FOUND",
            )
        return pb.HealthCheckResponse(status=self._status)

    async def Watch(
        self, request: pb.HealthCheckRequest, context: Any
    ) -> AsyncIterator[pb.HealthCheckResponse]:
        """The status now, and each one that follows; the newest for whoever reads slowly."""
        known = request.service in self._services
        del request  # it may be large, and the call long
        last = None
        while True:
            changed = self._changed
            status = self._status if known else pb.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                yield pb.HealthCheckResponse(status=status)
                last = status
            await changed.wait()
