"""The HTTP port of a server: listens from the start, answers once the model is loaded."""

from __future__ import annotations

from mora_serve.config import Config
from mora_serve.http.app import HttpApi, Parts
from mora_serve.http.server import HttpServer, listen
from mora_serve.http.tls import context
from mora_serve.http.tokens import TokenTexts
from mora_serve.metrics import Metrics
from mora_serve.server import tls
from mora_serve.server.assembly import Assembly
from mora_serve.server.interceptors import Entrance
from mora_serve.server.services import Services, Threads

_PREFIX = "server.http_"


class HttpPort:
    """Listens when made. ``port`` is the real one.

    Raises ConfigError for an address that cannot be listened on, for plaintext beyond loopback that
    was not asked for, and for certificates that cannot be used.
    """

    def __init__(
        self, config: Config, metrics: Metrics, entrance: Entrance, threads: Threads
    ) -> None:
        server = config.server
        secure = context(server)
        host, port = server.http_host, server.http_port
        tls.check_address(host, port, server, _PREFIX, secure=secure is not None)
        self.api = HttpApi(config, metrics, entrance, threads)
        listening = listen(host, port, _PREFIX)
        self.port: int = listening.getsockname()[1]
        self._server = HttpServer(self.api.asgi, listening, secure)

    async def start(self) -> None:
        """Take connections; calls are refused until ``serve``."""
        await self._server.start()

    def serve(self, assembly: Assembly, services: Services) -> None:
        """Answer from now on."""
        base = assembly.base
        self.api.parts = Parts(
            services,
            assembly.registry,
            base.tokenizer,
            TokenTexts(base.tokenizer),
            base.name,
            base.fingerprint,
            assembly.routing,
        )

    async def stop(self, seconds: float) -> None:
        """Hang up."""
        await self._server.stop(seconds)
