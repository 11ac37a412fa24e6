"""The deployments on Ray Serve: what Ray calls, and with which options."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from mora_serve.cluster import affinity
from mora_serve.cluster.calls import HandleReplicas
from mora_serve.cluster.gateway import Gateway
from mora_serve.cluster.policy import REPORT_SECONDS
from mora_serve.config import Config, load_config
from mora_serve.core import EngineStats
from mora_serve.errors import ConfigError
from mora_serve.server import ending, logs
from mora_serve.server.memory import limit_arenas

log = logging.getLogger(__name__)

GATEWAY, REPLICA = "gateway", "replica"
FAILED_SECONDS = 0.25  # for what a failed engine has told to leave a replica, which then ends


class ReplicaDeployment:
    """``Replica`` as Ray Serve calls it."""

    def __init__(self, config: Config) -> None:
        from mora_serve.cluster.replica import Replica  # imports torch

        logs.configure("info", config.server.log_format)
        # By its health Serve would take seconds to find out, in which it fails what comes to it,
        # and seems to have the least to do.
        self._replica = Replica(
            config, _hottest, lambda: ending.end_after(FAILED_SECONDS, ending.ENGINE_FAILED)
        )

    async def generate(self, *asked: Any) -> Any:
        """See ``Replica.generate``."""
        async with aclosing(self._replica.generate(*asked)) as items:
            async for item in items:
                yield item

    async def pool(self, *asked: Any) -> Any:
        """See ``Replica.pool``."""
        return await self._replica.pool(*asked)

    async def describe(self) -> Any:
        """See ``Replica.describe``."""
        return self._replica.describe()

    async def report(self) -> tuple[str, EngineStats]:
        """This replica's id, and what ``Replica.report`` says."""
        return serve.get_replica_context().replica_id.unique_id, self._replica.report()

    async def hottest(self, count: int) -> list[str]:
        """See ``Replica.hottest``."""
        return self._replica.hottest(count)

    async def record_routing_stats(self) -> dict[str, Any]:
        """See ``Replica.record_routing_stats``."""
        return self._replica.record_routing_stats()

    async def check_health(self) -> None:
        """See ``Replica.check_health``."""
        self._replica.check_health()

    async def __del__(self) -> None:
        self._replica.close()


class GatewayDeployment:
    """``Gateway`` as Ray Serve calls it."""

    async def __init__(self, config: Config, handle: Any) -> None:  # type: ignore[misc]  # Serve's
        limit_arenas()
        logs.configure("info", config.server.log_format)
        self._gateway = Gateway(config, HandleReplicas(handle))
        await self._gateway.start()

    async def address(self) -> str:
        """Where it listens, as clients want it."""
        return self._gateway.server.address

    async def check_health(self) -> None:
        """Raise where the server has failed."""
        if self._gateway.server.failed.is_set():
            raise RuntimeError("the gateway's server has failed")

    async def __del__(self) -> None:
        await self._gateway.stop()


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a configuration.

    ``args`` has ``config``, the path of a TOML file, and keys of the configuration with their
    values, both optional: {"config": "mora.toml", "cluster.replicas": 2}. Read where the
    application is built, the environment as well.

    Raises ConfigError for a configuration that cannot be served.
    """
    flags = dict(args)
    config = checked(load_config(flags.pop("config", None), flags=flags))
    replicas = replica_deployment(config).bind(config)
    return gateway_deployment(config).bind(config, replicas)


def checked(config: Config) -> Config:
    """A configuration for a cluster. Raises ConfigError where it is one for a single server."""
    if not (config.server.store or config.server.state):
        raise ConfigError(
            "server.store: it is empty; the gateways and all replicas need a registry that they "
            "share: give its URL, or a server.state that is one directory for all",
            field="server.store",
        )
    if config.engine.threads:
        return config
    return replace(config, engine=replace(config.engine, threads=max(1, int(config.cluster.cpus))))


def replica_deployment(config: Config) -> Any:
    """The deployment of the replicas."""
    cluster, batch = config.cluster, config.engine.max_batch
    options: dict[str, Any] = {"num_replicas": cluster.replicas}
    if cluster.max_replicas > cluster.replicas:
        options = {
            "autoscaling_config": {
                "min_replicas": cluster.replicas,
                "max_replicas": cluster.max_replicas,
                "target_ongoing_requests": cluster.target_requests or batch,
                "metrics_interval_s": 2.0,
                "look_back_period_s": 10.0,  # its mean counts
                "upscale_delay_s": 5.0,
                "downscale_delay_s": 300.0,
            }
        }
    router = RequestRouterConfig(
        request_routing_stats_period_s=REPORT_SECONDS,
        **(
            {
                "request_router_class": affinity.PATH,
                "request_router_kwargs": {"spill": cluster.spill},
            }
            if cluster.affinity
            else {}
        ),
    )
    return serve.deployment(
        ReplicaDeployment,
        name=REPLICA,
        # Half of it in line, where the engine's own order holds: tenants take turns there.
        max_ongoing_requests=2 * batch,
        max_queued_requests=config.engine.max_queue,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        request_router_config=router,
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=config.server.drain_seconds,
        logging_config={"enable_access_log": False},
        **options,
    )


def gateway_deployment(config: Config) -> Any:
    """The deployment of the gateways: one a node where any port of theirs is fixed."""
    server = config.server
    ports = (server.port, server.admin_port, server.http_port, server.metrics_port)
    apart = {"max_replicas_per_node": 1} if max(ports) > 0 else {}
    return serve.deployment(
        GatewayDeployment,
        name=GATEWAY,
        num_replicas=config.cluster.gateways,
        ray_actor_options={"num_cpus": config.cluster.gateway_cpus},
        health_check_period_s=2.0,
        graceful_shutdown_timeout_s=config.server.drain_seconds + 5,
        logging_config={"enable_access_log": False},
        **apart,
    )


def _hottest(count: int, seconds: float) -> Sequence[str]:
    """What another replica uses most; nothing where none answers in time."""
    here = serve.get_replica_context()
    handle = serve.get_deployment_handle(here.deployment, here.app_name)

    def ask() -> Sequence[str]:
        answer: Sequence[str] = handle.hottest.remote(count).result(timeout_s=seconds)
        return answer

    # On a thread: the replica is made on its event loop, where Serve refuses to wait.
    with ThreadPoolExecutor(1) as asking:
        try:
            return asking.submit(ask).result()
        except Exception as e:  # whatever it is, the replica starts without
            log.info("no other replica says what it uses: %s", type(e).__name__)
            return ()
