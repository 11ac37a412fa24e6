"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self, Unpack

import grpc

from mora_serve import messages
from mora_serve.client import connection, requests, security
from mora_serve.client.arguments import strict
from mora_serve.client.connection import Delta, Result, Streamed, Stubs
from mora_serve.client.requests import CallOptions, CardOptions, GenerateOptions, RouteOptions
from mora_serve.client.security import ApiKey, Tls
from mora_serve.core import Decision
from mora_serve.v1 import adapters_pb2, generation_pb2, router_pb2, server_pb2


class Stream(Streamed):
    """A streamed answer: iterate over its deltas; leaving the context cancels what is left."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[Delta]:
        try:
            for message in self._received:
                if (delta := self.take(message)) is not None:
                    yield delta
        except grpc.RpcError as e:
            raise connection.error_of(e, self._stubs.address) from None


class Client(Stubs):
    """A blocking client; safe to share between threads. ``timeout``: seconds a call, None: none.

    ``api_key`` goes with every call. ``tls`` secures the connection: a ``Tls``, or True where the
    server's certificate is of a public authority; ``credentials`` are grpc's own instead. Without
    either, a key is sent to loopback only, unless ``allow_plaintext`` says that the network itself
    is protected. Raises ConfigError for a key that would be sent in plain.
    """

    def __init__(
        self,
        address: str = connection.DEFAULT_ADDRESS,
        *,
        tenant: str = "",
        timeout: float | None = 120.0,
        api_key: ApiKey | None = None,
        tls: Tls | bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        allow_plaintext: bool = False,
    ) -> None:
        secure = security.secured(address, api_key, tls, credentials, allow_plaintext)
        options = connection.options(address, tls)
        channel = (
            grpc.insecure_channel(address, options)
            if secure is None
            else grpc.secure_channel(address, secure, options)
        )
        super().__init__(channel, address, tenant, timeout, api_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls in flight are cancelled."""
        self.channel.close()

    @strict
    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Result:
        """Answer a prompt."""
        request = requests.generate(generation_pb2.GenerateRequest, prompt, options)
        return connection.read_result(self._run(self.generation.Generate, request, options))

    @strict
    def stream(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """Answer a prompt piece by piece; returns when the decision is known."""
        request = requests.generate(generation_pb2.GenerateStreamRequest, prompt, options)
        call = self.generation.GenerateStream(request, **self.carry(options))
        try:
            return Stream(self, call, call, next(call))
        except grpc.RpcError as e:
            raise connection.error_of(e, self.address) from None

    @strict
    def route(self, prompt: str | None = None, **options: Unpack[RouteOptions]) -> Decision:
        """Decide as ``generate`` would, without generating."""
        request = requests.route(prompt, options)
        return messages.decision_of(self._run(self.router.Route, request, options).decision)

    @strict
    def register_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        sha256: str = "",
        **options: Unpack[CardOptions],
    ) -> adapters_pb2.Adapter:
        """Register a directory under the server's adapter root.

        Content that the name has already changes nothing, its card included: see update_adapter.
        With ``sha256``, which ``cat adapter_config.json adapter_model.safetensors
        routing_card.json | sha256sum`` gives, without the card where there is none, the server
        takes no other files.
        """
        request = requests.register(name, path, replace, options, sha256)
        return self._adapter(self.adapters.RegisterAdapter, request, options)

    @strict
    def upload_adapter(
        self,
        name: str,
        directory: str | Path,
        *,
        replace: bool = False,
        **options: Unpack[CardOptions],
    ) -> adapters_pb2.Adapter:
        """Register a directory of this machine by sending its files; else as register_adapter."""
        upload = requests.upload(name, Path(directory), replace, options)
        return self._adapter(self.adapters.UploadAdapter, upload, options)

    @strict
    def update_adapter(self, name: str, **options: Unpack[CardOptions]) -> adapters_pb2.Adapter:
        """Replace an adapter's routing card; what is not given becomes empty."""
        request = requests.update(name, options)
        return self._adapter(self.adapters.UpdateAdapter, request, options)

    @strict
    def get_adapter(self, name: str, **options: Unpack[CallOptions]) -> adapters_pb2.Adapter:
        """Describe an adapter."""
        request = adapters_pb2.GetAdapterRequest(name=name)
        return self._adapter(self.adapters.GetAdapter, request, options)

    @strict
    def pin_adapter(
        self, name: str, pinned: bool = True, **options: Unpack[CallOptions]
    ) -> adapters_pb2.Adapter:
        """Keep an adapter on the device, or no longer."""
        request = adapters_pb2.PinAdapterRequest(name=name, pinned=pinned)
        return self._adapter(self.adapters.PinAdapter, request, options)

    @strict
    def unregister_adapter(self, name: str, **options: Unpack[CallOptions]) -> None:
        """Remove an adapter; requests in flight finish with it."""
        request = adapters_pb2.UnregisterAdapterRequest(name=name)
        self._run(self.adapters.UnregisterAdapter, request, options)

    @strict
    def list_adapters(self, **options: Unpack[CallOptions]) -> list[adapters_pb2.Adapter]:
        """All adapters of the tenant, by name."""
        found: list[adapters_pb2.Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=200)
        while True:
            page = self._run(self.adapters.ListAdapters, request, options)
            found += page.adapters
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    @strict
    def load_router(
        self, path: str | None = None, data: bytes | None = None, **options: Unpack[CallOptions]
    ) -> router_pb2.Router:
        """Replace the router by a file under the server's adapter root, or by a file's bytes."""
        request = requests.load_router(path, data)
        router: router_pb2.Router = self._run(self.router.LoadRouter, request, options).router
        return router

    @strict
    def get_router(self, **options: Unpack[CallOptions]) -> router_pb2.Router:
        """Describe the router in use; its digest is empty when there is none."""
        request = router_pb2.GetRouterRequest()
        router: router_pb2.Router = self._run(self.router.GetRouter, request, options).router
        return router

    @strict
    def export_feedback(
        self, cursor: str = "", *, since: datetime | None = None, **options: Unpack[CallOptions]
    ) -> Iterator[router_pb2.ExportFeedbackResponse]:
        """The labelled prompts of the tenant, part by part, oldest first.

        Only those that follow ``cursor``, which is that of an earlier part, and only from
        ``since`` on; a time without a zone is one of UTC.
        """
        request = requests.export_feedback(cursor, since)
        call = self.router.ExportFeedback(request, **self.carry(options))
        try:
            yield from call
        except grpc.RpcError as e:
            raise connection.error_of(e, self.address) from None
        finally:
            call.cancel()

    @strict
    def server_info(self, **options: Unpack[CallOptions]) -> server_pb2.GetServerInfoResponse:
        """What is served, with which limits."""
        request = server_pb2.GetServerInfoRequest()
        info: server_pb2.GetServerInfoResponse = self._run(
            self.server.GetServerInfo, request, options
        )
        return info

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Return when the server is ready. Raises Unavailable after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            with suppress(grpc.RpcError):
                answer = self.health.Check(connection.HEALTH, timeout=left, wait_for_ready=True)
                if connection.is_ready(answer):
                    return
            time.sleep(connection.HEALTH_SECONDS)
        raise connection.not_ready(self.address, timeout)

    def _adapter(self, method: Any, request: Any, options: CallOptions) -> adapters_pb2.Adapter:
        adapter: adapters_pb2.Adapter = self._run(method, request, options).adapter
        return adapter

    def _run(self, method: Any, request: Any, options: CallOptions) -> Any:
        try:
            return method(request, **self.carry(options))
        except grpc.RpcError as e:
            raise connection.error_of(e, self.address) from None
