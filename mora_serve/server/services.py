"""The four services, made of a server's parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from mora_serve.access.audit import Audit
from mora_serve.metrics import Metrics
from mora_serve.server.adapters import AdapterServicer
from mora_serve.server.answers import Answers
from mora_serve.server.bridge import Bridge
from mora_serve.server.decider import Decider
from mora_serve.server.feedback import FeedbackRecorder
from mora_serve.server.fetching import Fetcher
from mora_serve.server.follow import Names, Pins
from mora_serve.server.generation import GenerationServicer
from mora_serve.server.info import ServerServicer, describe
from mora_serve.server.prompts import Prompts
from mora_serve.server.router import RouterServicer
from mora_serve.server.tracing import Tracing
from mora_serve.server.turns import TurnExecutor
from mora_serve.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

if TYPE_CHECKING:
    from mora_serve.server.assembly import Assembly

SERVICES = tuple(
    service.full_name
    for module in (generation_pb2, adapters_pb2, router_pb2, server_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)


class LateServices(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in stubs only
    """Services that a running grpc server gets later: it takes the server's place in adding."""

    def __init__(self) -> None:
        self._handlers: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """Serve a service from now on."""
        self._handlers += handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Generated code calls it besides; there is nothing more to do."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The method's handler, or None."""
        found = (handler.service(handler_call_details) for handler in self._handlers)
        return next((method for method in found if method is not None), None)


@dataclass(frozen=True)
class Threads:
    """Threads for what would block the event loop, by kind, so that none waits for another.

    ``tokenize`` is for long prompts, ``route`` for short work, ``registry`` for the disk, ``fetch``
    for contents in a store: these serve tenants in turn. ``load`` is for new routers.
    """

    tokenize: Executor = field(default_factory=lambda: TurnExecutor(2, "tokenize"))
    route: Executor = field(default_factory=lambda: TurnExecutor(2, "route"))
    registry: Executor = field(default_factory=lambda: TurnExecutor(2, "registry"))
    fetch: Executor = field(default_factory=lambda: TurnExecutor(4, "fetch"))
    load: Executor = field(default_factory=lambda: ThreadPoolExecutor(1, "load"))

    def shutdown(self) -> None:
        """Drop what waits; what runs goes on to its end."""
        for executor in (self.tokenize, self.route, self.registry, self.fetch, self.load):
            executor.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Services:
    """What answers calls, whatever protocol they come by; ``servicers`` by the services' names."""

    answers: Answers
    servicers: Mapping[str, Any]


def add_services(
    server: LateServices,
    assembly: Assembly,
    bridge: Bridge,
    metrics: Metrics,
    threads: Threads,
    feedback: FeedbackRecorder | None,
    audit: Audit,
    tracing: Tracing | None = None,
) -> Services:
    """Add the services to a grpc server, and let metrics and pins follow the registry."""
    config, base, registry = assembly.config, assembly.base, assembly.registry
    engine, routing = assembly.engine, assembly.routing
    names = Names(registry, metrics)
    metrics.watch(engine.stats, names.of, names.count)
    vocab_size = base.shape.vocab_size
    prompts = Prompts(base.tokenizer, vocab_size, engine.max_context, threads.tokenize)

    def resident() -> tuple[str, ...]:
        return engine.stats().resident

    decider = Decider(
        assembly.selector,
        registry,
        prompts,
        metrics,
        config.adapters,
        threads.route,
        Fetcher(registry, threads.fetch, resident) if assembly.alone else None,
    )
    answers = Answers(prompts, decider, bridge, config, vocab_size, feedback, tracing)
    generation = GenerationServicer(answers)
    adapters = AdapterServicer(
        registry,
        routing,
        Pins(engine, registry, threads.fetch if assembly.alone else None),
        resident,
        config,
        base.shape,
        base.fingerprint,
        threads.registry,
        threads.route,
        audit,
    )
    router = RouterServicer(prompts, decider, routing, config, threads.load, feedback, audit)
    info = ServerServicer(describe(assembly), registry, routing, threads.route)
    servicers = {}
    for module, add, servicer in (
        (generation_pb2, generation_pb2_grpc.add_GenerationServiceServicer_to_server, generation),
        (adapters_pb2, adapters_pb2_grpc.add_AdapterServiceServicer_to_server, adapters),
        (router_pb2, router_pb2_grpc.add_RouterServiceServicer_to_server, router),
        (server_pb2, server_pb2_grpc.add_ServerServiceServicer_to_server, info),
    ):
        add(servicer, server)  # type: ignore[no-untyped-call]
        [service] = module.DESCRIPTOR.services_by_name.values()
        servicers[service.full_name] = servicer
    return Services(answers, servicers)
