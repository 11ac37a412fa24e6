"""A cluster on this machine: Ray nodes on loopback, ``mora_serve.cluster`` on them, no proxies."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from mora_serve.core import EngineStats

NAMESPACE, NAME = "serve", "mora"


class LocalCluster:
    """Up inside its context. ``flags`` are keys of the configuration; ports are free ones.

    Each of the ``nodes`` has a raylet and an object store of its own, and says that it has ``cpus``
    cores, of which a gateway and a replica take one each; Ray spreads them over the nodes.
    Ray's workers are told nothing of the surroundings' settings but PYTHONPATH.
    """

    def __init__(self, flags: Mapping[str, Any], nodes: int = 2, cpus: int = 4) -> None:
        self._flags = {
            "server.port": 0,
            "server.metrics_port": -1,
            "server.log_calls": False,
            "server.drain_seconds": 2,
            "engine.kv_bytes": 64 << 20,
            "engine.threads": 1,
            "cluster.cpus": 1,
            **flags,
        }
        self._nodes, self._cpus = nodes, cpus
        self._cluster: Any = None
        self.addresses: list[str] = []

    def __enter__(self) -> LocalCluster:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        from mora_serve.cluster import app
        from mora_serve.cluster.deploying import GATEWAY

        try:
            self._cluster = Cluster(shutdown_at_exit=True)
            for _ in range(self._nodes):
                self._cluster.add_node(
                    num_cpus=self._cpus,
                    object_store_memory=80 << 20,
                    include_dashboard=False,
                    include_log_monitor=False,
                    no_monitor=True,
                )
            ray.init(self._cluster.address, log_to_driver=False, logging_level="error")
            serve.start(proxy_location="Disabled")
            serve.run(app(self._flags), name=NAME, route_prefix=None)
            asked = serve.get_deployment_handle(GATEWAY, NAME).broadcast("address")
            self.addresses = asked.results(timeout_s=30)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def address(self) -> str:
        """One gateway's."""
        return self.addresses[0]

    def reports(self) -> list[EngineStats]:
        """What the replicas that are up say of their engines."""
        from ray import serve

        from mora_serve.cluster.deploying import REPLICA

        asked = serve.get_deployment_handle(REPLICA, NAME).broadcast("report")
        answers = asked.results(timeout_s=10, return_exceptions=True)
        return [answer[1] for answer in answers if isinstance(answer, tuple)]

    def kill_replicas(self, count: int = 1) -> None:
        """End the processes of so many replicas, in the middle of whatever they do."""
        import ray

        from mora_serve.cluster.deploying import REPLICA

        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        replicas = sorted(n for n in names if n.startswith(f"SERVE_REPLICA::{NAME}#{REPLICA}#"))
        for name in replicas[:count]:
            ray.kill(ray.get_actor(name, NAMESPACE))

    def wait_for(self, replicas: int, seconds: float) -> float:
        """Wait until so many replicas are up; the seconds that it took. Raises TimeoutError."""
        start = time.monotonic()
        while (waited := time.monotonic() - start) < seconds:
            if len(self.reports()) >= replicas:
                return waited
            time.sleep(0.5)
        raise TimeoutError(f"{replicas} replicas are not up in {seconds:g} s")

    def _end(self) -> None:
        import ray
        from ray import serve

        try:
            if ray.is_initialized():
                serve.shutdown()
        finally:
            ray.shutdown()
            if self._cluster is not None:
                self._cluster.shutdown()
                self._cluster = None
