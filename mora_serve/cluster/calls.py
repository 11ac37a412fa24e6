"""Ray Serve's handle of the replicas, as ``RemoteEngine`` calls them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import (
    ObjectLostError,
    RayActorError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from mora_serve.cluster.remote import Description, ReplicaLost
from mora_serve.core import EngineStats, Event, Request
from mora_serve.errors import Failure, ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from mora_serve.router.arrays import Floats

log = logging.getLogger(__name__)

_LOST = (
    RayActorError,
    WorkerCrashedError,
    ObjectLostError,
    ReplicaUnavailableError,
    TaskCancelledError,  # by Serve: of a caller who leaves nothing is heard here
)


class HandleReplicas:
    """See ``mora_serve.cluster.remote.Replicas``; ``handle`` is the deployment's."""

    def __init__(self, handle: Any) -> None:
        # Over gRPC: a message through Ray's object store takes three times the gateway's cores.
        self._handle = handle.options(_by_reference=False)
        self._generate = self._handle.options(method_name="generate", stream=True)
        self._pool = self._handle.options(method_name="pool")

    async def stream(
        self, request: Request, left: float | None
    ) -> AsyncGenerator[Event | Failure | None, None]:
        """One request's events; leaving the iterator early ends it in the replica."""
        response = self._generate.remote(request, left)
        ended = False
        try:
            async for item in response:
                yield item
            ended = True
        except _LOST as e:
            log.debug("lost a replica: %s", type(e).__name__)
            raise ReplicaLost from None
        except BackPressureError:
            raise ResourceExhausted(
                "server: as many requests wait for a replica as it takes; retry later",
                reason="QUEUE_FULL",
                retry_after=1.0,
            ) from None
        except DeploymentUnavailableError:
            raise _no_replica() from None
        finally:
            if not ended:
                response.cancel()

    async def pool(
        self, texts: Sequence[str], depth: int, max_tokens: int, background: bool, tenant: str
    ) -> Floats:
        """Pooled hidden states [texts, hidden]. Raises what the replica's engine raises."""
        try:
            answer = await self._pool.remote(list(texts), depth, max_tokens, background, tenant)
        except (*_LOST, DeploymentUnavailableError):
            raise _no_replica() from None
        if isinstance(answer, Failure):
            raise answer.error()
        states: Floats = answer
        return states

    async def reports(self) -> list[EngineStats]:
        """What each replica that is up says of its engine."""
        asked = self._handle.broadcast("report")
        answers = await asked.results_async(return_exceptions=True)  # of those that end now
        return [answer for answer in answers if isinstance(answer, EngineStats)]

    async def describe(self) -> Description:
        """What one of them says of itself; waits for the first."""
        answer: Description = await self._handle.describe.remote()
        return answer


def _no_replica() -> Unavailable:
    return Unavailable(
        "server: no replica is up at the moment; retry", reason="NO_REPLICA", retry_after=1.0
    )
