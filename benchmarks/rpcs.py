"""Every call that a server has, found in the descriptors, made with raw bytes and any metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from grpc_reflection.v1alpha import reflection_pb2

from benchmarks.rich_status import reason_of
from mora_serve.v1 import adapters_pb2, generation_pb2, router_pb2, server_pb2


def methods_of(*modules: Any) -> Iterator[MethodDescriptor]:
    """The methods of generated modules."""
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from service.methods


# mora-serve's own, by name.
METHODS = {m.name: m for m in methods_of(generation_pb2, adapters_pb2, router_pb2, server_pb2)}


def path_of(method: MethodDescriptor) -> str:
    """The full method name that a channel takes."""
    return f"/{method.containing_service.full_name}/{method.name}"


def raw(channel: grpc.Channel, path: str, streams: tuple[bool, bool]) -> Any:
    """A call of this path with bytes; ``streams``: many requests, many answers."""
    kind = "_".join("stream" if many else "unary" for many in streams)
    return getattr(channel, kind)(path)


@dataclass(frozen=True)
class Rpc:
    """One call: its full method name, and which sides stream."""

    method: str
    request_streaming: bool
    response_streaming: bool


@dataclass(frozen=True)
class Outcome:
    """How a call ended: code, text, the machine-readable reason (empty without details)."""

    code: grpc.StatusCode
    text: str
    reason: str
    answers: tuple[bytes, ...]


def rpcs(*, reflection: bool = True) -> Iterator[Rpc]:
    """All of mora-serve's calls, and that of reflection; health is open to all."""
    others = methods_of(reflection_pb2) if reflection else ()
    for method in (*METHODS.values(), *others):
        yield Rpc(path_of(method), method.client_streaming, method.server_streaming)


def call(
    channel: grpc.Channel,
    rpc: Rpc,
    requests: Sequence[bytes] = (b"",),
    metadata: Sequence[tuple[str, str]] = (),
    timeout: float = 20.0,
) -> Outcome:
    """Make a call to its end."""
    method = raw(channel, rpc.method, (rpc.request_streaming, rpc.response_streaming))
    request = iter(requests) if rpc.request_streaming else requests[0]
    answers: tuple[bytes, ...] = ()
    try:
        answer = method(request, metadata=tuple(metadata), timeout=timeout)
        answers = tuple(answer) if rpc.response_streaming else (answer,)
    except grpc.RpcError as e:
        return Outcome(e.code(), e.details() or "", reason_of(e), answers)
    return Outcome(grpc.StatusCode.OK, "", "", answers)
