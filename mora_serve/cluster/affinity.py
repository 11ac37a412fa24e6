"""Ray Serve's request router for mixtures; see ``policy`` for the rule.

Without FIFOMixin, so that the replica found for a request is that request's: with it, Serve gives
the place to whichever request waits longest, whose adapters may be elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from mora_serve.cluster.policy import Fleet, choose
from mora_serve.config import DEFAULT_SPILL
from mora_serve.core import Request

PATH = f"{__name__}.AffinityRouter"


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # untyped
    """Sends a mixture to where its adapters are resident, and others to the less loaded of two."""

    def initialize_state(self, spill: float = DEFAULT_SPILL, **_: Any) -> None:
        """Take the configuration. Serve would hang, silently, on an argument that is none."""
        self._spill = spill
        self._fleet: Fleet[str] = Fleet()
        self._reports: dict[str, Any] = {}  # the last of each replica
        self._rng = random.Random()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas to try, one group after the other; the shortest line of a group wins."""
        if pending_request is not None:
            # Where all are full, Serve would come back at once, without end.
            pending_request.routing_context.should_backoff = True
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._look(by_name)
        name = choose(self._fleet, _wanted(pending_request), self._rng, spill=self._spill)
        return [[by_name[name]], candidate_replicas]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: Any, result: object
    ) -> None:
        """A replica has taken a request: its adapters are there, or on their way."""
        if replica_id.unique_id in self._fleet:
            for digest in _wanted(pending_request):
                self._fleet.loaded(replica_id.unique_id, digest)

    def _look(self, replicas: dict[str, RunningReplica]) -> None:
        """Take in who is there, and what is new of them."""
        for name in [name for name in self._fleet.keys if name not in replicas]:
            self._fleet.remove(name)
            del self._reports[name]
        for name, replica in replicas.items():
            load = self.replica_queue_len_cache.get(replica.replica_id) or 0
            report = replica.routing_stats or {}  # none yet of a new one
            if self._reports.get(name) == report:
                self._fleet.queued(name, load)
            else:
                resident = report.get("resident", ())
                self._fleet.report(name, resident, load, report.get("slots", 0))
                self._reports[name] = report


def _wanted(pending: PendingRequest | None) -> Sequence[str]:
    """The digests of a call's mixture; calls of other methods have none."""
    if pending is None or not pending.args or not isinstance(pending.args[0], Request):
        return ()
    return [digest for digest, _ in pending.args[0].mixture.merged()]
