"""ServerService: what is served, with which limits."""

# ruff: noqa: N802 - methods carry the names of their calls

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from mora_serve import __version__
from mora_serve.adapters.registry import Registry
from mora_serve.router.routing import Routing
from mora_serve.server import call as calls
from mora_serve.server.gate import Places
from mora_serve.v1 import server_pb2 as pb
from mora_serve.v1.server_pb2_grpc import ServerServiceServicer

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    from mora_serve.server.assembly import Assembly

    Context = ServicerContext[Any, Any]

MAX_LOOKUPS = 256


class ServerServicer(ServerServiceServicer):
    """GetServerInfo; ``fixed`` holds what does not change while the server runs.

    ``executor`` counts the adapters, which takes milliseconds where there are thousands.
    """

    def __init__(
        self,
        fixed: pb.GetServerInfoResponse,
        registry: Registry,
        routing: Routing,
        executor: Executor,
    ) -> None:
        self._fixed = fixed
        self._registry = registry
        self._routing = routing
        self._executor = executor
        self._lookups = Places(MAX_LOOKUPS, "look-ups of the server")

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """Describe the server."""
        info = pb.GetServerInfoResponse()
        info.CopyFrom(self._fixed)
        if (snapshot := self._routing.snapshot) is not None:
            info.router_digest = snapshot.router.digest
        loop, tenant = asyncio.get_running_loop(), calls.current().tenant
        with self._lookups.taken(tenant):
            served = await loop.run_in_executor(self._executor, self._registry.served, tenant)
        info.adapters = len(served)
        return info


def describe(assembly: Assembly) -> pb.GetServerInfoResponse:
    """What GetServerInfo says and what does not change."""
    config, base = assembly.config, assembly.base
    return pb.GetServerInfoResponse(
        version=__version__,
        base=pb.BaseModel(
            name=base.name,
            fingerprint=base.fingerprint,
            architecture=base.shape.model_type,
            quantization=base.quantization,
            dtype=base.dtype,
            device=base.device,
            vocab_size=base.shape.vocab_size,
            chat=base.tokenizer.has_chat_template,
        ),
        limits=pb.Limits(
            max_context=assembly.engine.max_context,
            max_tokens=config.engine.max_tokens,
            max_mixture=config.adapters.max_mixture,
            max_rank=config.adapters.max_rank,
            max_stop=config.engine.max_stop,
            max_logprobs=config.engine.max_logprobs,
            max_adapters=config.adapters.max_adapters,
            slots=assembly.engine.slots,
            max_adapter_bytes=config.adapters.max_bytes,
            max_prompts=config.adapters.max_prompts,
            max_queue=config.engine.max_queue,
            max_message_bytes=config.server.max_message_bytes,
        ),
        adapter_dtype=assembly.engine.adapter_dtype,
    )
