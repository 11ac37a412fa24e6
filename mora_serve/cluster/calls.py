"""Ray Serve's handle of the replicas, as ``RemoteEngine`` calls them.

A replica's own errors leave it as ``Failure``: whatever a call raises here is Serve's or Ray's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
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

from mora_serve.cluster.wire import Description, Pooling, ReplicaLost
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
    """See ``mora_serve.cluster.wire.Replicas``; ``handle`` is the deployment's."""

    def __init__(self, handle: Any) -> None:
        # Over gRPC: a message through Ray's object store takes three times the gateway's cores.
        self._handle = handle.options(_by_reference=False)
        self._generate = self._handle.options(method_name="generate", stream=True)
        self._pool = self._handle.options(method_name="pool")

    async def stream(
        self, request: Request, left: float | None, fingerprint: str
    ) -> AsyncGenerator[Event | Failure | None, None]:
        """One request's events; leaving the iterator early ends it in the replica."""
        response = self._generate.remote(request, left, fingerprint)
        ended = False
        try:
            with _translated():
                async for item in response:
                    yield item
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def pool(self, pooling: Pooling, fingerprint: str) -> Floats:
        """Pooled hidden states [texts, hidden]. Raises what the replica's engine raises."""
        response = self._pool.remote(pooling, fingerprint)
        try:
            with _translated():
                answer = await response
        except ReplicaLost:
            raise _no_replica() from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        if isinstance(answer, Failure):
            raise answer.error()
        states: Floats = answer
        return states

    async def reports(self) -> dict[str, EngineStats]:
        """What each replica that is up says of its engine, by the replica's id."""
        try:
            asked = self._handle.broadcast("report")
            answers = await asked.results_async(return_exceptions=True)  # of those that end now
        except DeploymentUnavailableError:  # there is none
            return {}
        return dict(answer for answer in answers if isinstance(answer, tuple))

    async def describe(self) -> Description:
        """What one of them says of itself; waits for the first. Raises ReplicaLost."""
        with _translated():
            answer: Description = await self._handle.describe.remote()
        return answer


@contextmanager
def _translated() -> Iterator[None]:
    """Raise ReplicaLost, or a MoraError, for what a call of a replica raises."""
    try:
        yield
    except BackPressureError:
        raise ResourceExhausted(
            "server: as many requests wait for a replica as it takes; retry later",
            reason="QUEUE_FULL",
            retry_after=1.0,
        ) from None
    except DeploymentUnavailableError:
        raise _no_replica() from None
    except _LOST as e:
        log.debug("lost a replica: %s", type(e).__name__)
        raise ReplicaLost from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaLost from None  # Serve's word for a call that the replica's end has cancelled
    except Exception:  # of its transport, a node that is gone, memory that has run out
        log.exception("a call of a replica failed")
        raise ReplicaLost from None


def _no_replica() -> Unavailable:
    return Unavailable(
        "server: no replica is up at the moment; retry", reason="NO_REPLICA", retry_after=1.0
    )
