"""Ray Serve's request router for mixtures; see ``ranking`` for the order.

Without FIFOMixin, so that the replica found for a request is that request's: with it, Serve gives
the place to whichever request waits longest, whose adapters may be elsewhere.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from mora_serve.cluster.ranking import Standing, rank
from mora_serve.core import Request

PATH = f"{__name__}.AffinityRouter"


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # untyped
    """Sends a mixture to where its adapters are resident, and others to the less loaded of two."""

    def initialize_state(self, spill: float = 1.25, **_: Any) -> None:
        """Take the configuration. Serve would hang, silently, on an argument that is none."""
        self._spill = spill

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas to try, one group after the other; the shortest line of a group wins."""
        if pending_request is not None:
            # Where all are full, Serve would come back at once, without end.
            pending_request.routing_context.should_backoff = True
        wanted = _wanted(pending_request)
        if not wanted:
            pair = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
            return [pair, candidate_replicas]
        standings = [self._standing(replica) for replica in candidate_replicas]
        return [[candidate_replicas[i]] for i in rank(wanted, standings, self._spill)]

    def _standing(self, replica: RunningReplica) -> Standing:
        queue = self.replica_queue_len_cache.get(replica.replica_id) or 0
        stats = replica.routing_stats or {}  # none yet of a new one
        resident = stats.get("resident", ())
        free = stats.get("slots", 0) - len(resident)
        return Standing(replica.replica_id.unique_id, queue, resident, free)


def _wanted(pending: PendingRequest | None) -> list[str]:
    """The digests of a call's mixture; calls of other methods have none."""
    if pending is None or not pending.args or not isinstance(pending.args[0], Request):
        return []
    return [digest for digest, _ in pending.args[0].mixture.merged()]
