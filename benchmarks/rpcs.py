"""Every call that a server has, found in the descriptors, made with raw bytes and any metadata."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_status import rpc_status

from mora_serve.v1 import adapters_pb2, generation_pb2, router_pb2, server_pb2

MODULES = (generation_pb2, adapters_pb2, router_pb2, server_pb2)


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
    modules = (*MODULES, reflection_pb2) if reflection else MODULES
    for module in modules:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield Rpc(
                    f"/{service.full_name}/{method.name}",
                    method.client_streaming,
                    method.server_streaming,
                )


def call(
    channel: grpc.Channel,
    rpc: Rpc,
    requests: Sequence[bytes] = (b"",),
    metadata: Sequence[tuple[str, str]] = (),
    timeout: float = 20.0,
) -> Outcome:
    """Make a call to its end."""
    kind = "{}_{}".format(
        "stream" if rpc.request_streaming else "unary",
        "stream" if rpc.response_streaming else "unary",
    )
    method = getattr(channel, kind)(rpc.method)
    request = iter(requests) if rpc.request_streaming else requests[0]
    answers: tuple[bytes, ...] = ()
    try:
        answer = method(request, metadata=tuple(metadata), timeout=timeout)
        answers = tuple(answer) if rpc.response_streaming else (answer,)
    except grpc.RpcError as e:
        return Outcome(e.code(), e.details() or "", reason_of(e), answers)
    return Outcome(grpc.StatusCode.OK, "", "", answers)


def reason_of(error: grpc.RpcError) -> str:
    """The reason in the rich status of an error; empty where there is none."""
    from google.rpc import error_details_pb2  # type: ignore[import-untyped]

    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return str(info.reason)
    return ""
