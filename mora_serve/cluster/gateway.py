"""A gateway: the server without the base, in an actor of Ray Serve's.

It is ``MoraServer``, on its own port, with the replicas' engines in place of one of its own: the
same services, statuses, limits, health and reflection, metrics, TLS and HTTP API. Ray Serve's own
gRPC proxy (2.60) would not do: it has no interceptors and so no keys and no limits, no TLS, neither
grpc.health.v1 nor reflection, and it answers an exception with its traceback.

The router decides here, which needs the tokenizer and the registry. One on hidden states asks a
replica for them.
"""

from __future__ import annotations

import asyncio
import logging

from mora_serve.cluster.calls import HandleReplicas
from mora_serve.cluster.remote import PAUSE, RemoteBase, RemoteEngine
from mora_serve.cluster.wire import Description, ReplicaLost, Replicas
from mora_serve.config import Config
from mora_serve.errors import ConfigError
from mora_serve.server.app import MoraServer
from mora_serve.server.assembly import Assembly, join

log = logging.getLogger(__name__)

OTHER_BASE_SECONDS = 600.0  # in which an application's replicas take up another base
LOOK_SECONDS = 5.0


class Gateway:
    """Speaks the API; ``replicas`` calls the replicas."""

    def __init__(self, config: Config, replicas: HandleReplicas) -> None:
        self._config = config
        self._replicas = replicas
        self._loop = asyncio.get_running_loop()
        self._server = MoraServer(config, self._assemble)

    async def start(self) -> None:
        """Listen, and serve once a replica is there. Raises ConfigError."""
        try:
            await self._server.start()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Drain, and end."""
        await self._server.stop()

    @property
    def server(self) -> MoraServer:
        """The server that listens."""
        return self._server

    def _assemble(self, config: Config) -> Assembly:
        """The parts of the server; off the event loop."""
        from mora_serve.model.loading import read_base  # imports torch

        files = read_base(config.base.model, config.base.revision)
        said = asyncio.run_coroutine_threadsafe(
            described(self._replicas, files.fingerprint), self._loop
        ).result()
        base = RemoteBase(
            name=said.name,
            shape=files.shape,
            tokenizer=files.tokenizer,
            fingerprint=files.fingerprint,
            quantization=said.quantization,
            dtype=said.dtype,
            device=said.device,
        )
        engine = RemoteEngine(
            self._replicas,
            base,
            said,
            config,
            self._loop,
            self._server.say,
        )
        return join(config, base, lambda registry: engine, alone=False)


async def described(
    replicas: Replicas, fingerprint: str, seconds: float = OTHER_BASE_SECONDS
) -> Description:
    """What a replica with this base says of itself; waits for the first without end.

    Raises ConfigError where those that are up still run another base after ``seconds``.
    """
    until: float | None = None
    while True:
        try:
            said = await replicas.describe()
        except ReplicaLost:
            await asyncio.sleep(PAUSE)
            continue
        if said.fingerprint == fingerprint:
            return said
        now = asyncio.get_running_loop().time()
        until = now + seconds if until is None else until
        if now >= until:
            raise ConfigError(
                f"base.model: the replicas run base {said.fingerprint}, and the gateway's files "
                f"are those of {fingerprint}; give both the same",
                field="base.model",
            )
        log.warning("a replica runs another base; waiting for one with this gateway's")
        await asyncio.sleep(min(LOOK_SECONDS, seconds))
